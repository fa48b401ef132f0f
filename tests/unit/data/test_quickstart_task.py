"""The embedded task: its problems, its tokenizer, its cache."""

from __future__ import annotations

import json

import pytest

from hf_rlhf.data import addition_task
from hf_rlhf.data.addition_task import WarmUp, addition_dataset, addition_model, addition_tokenizer

SHORT = WarmUp(target=0.0)
"""One step."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_RLHF_CACHE", str(tmp_path))
    return tmp_path


def test_the_problems_are_all_sums_of_two_numbers_of_two_digits():
    train, held_out = addition_dataset()
    assert (len(train), len(held_out)) == (7588, 512)
    pairs = set()
    for row in train + held_out:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["answer"])
        pairs.add((int(a), int(b)))
    assert pairs == {(a, b) for a in range(10, 100) for b in range(10, 100)}


def test_the_problems_are_the_same_each_time():
    assert addition_dataset() == addition_dataset()


def test_the_tokenizer_gives_back_text_one_token_per_character():
    tokenizer = addition_tokenizer()
    text = "37+58=\n Hello, (x) ~ # 9."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("aéb")["input_ids"], skip_special_tokens=False) == "<bos>a<unk>b"


def test_demonstrations_have_the_stated_share_of_wrong_answers():
    import torch

    right = addition_task._sums(addition_dataset()[0])
    noisy = addition_task._noisy(right, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(noisy[:, :2], right[:, :2])
    assert set(noisy[:, 2].tolist()) == set(addition_task.SUMS) == set(right[:, 2].tolist())
    assert (noisy[:, 2] != right[:, 2]).double().mean().item() == pytest.approx(0.5 * 178 / 179, abs=0.02)
    assert torch.equal(addition_task._noisy(right, 0.0, torch.Generator()), right)


def test_only_the_answer_and_its_end_are_learned():
    import torch

    tokenizer = addition_tokenizer()
    ids, mask = addition_task._encode(tokenizer, torch.tensor([[1, 2, 3], [99, 99, 198]]))
    learned = [tokenizer.decode(row[chosen.bool()]) for row, chosen in zip(ids, mask, strict=True)]
    assert learned == ["3<eos>", "198<eos>"]
    assert tokenizer.decode(ids[1]) == "<bos>99+99=198<eos>"


def test_the_log_probs_of_answers_sum_to_the_probability_of_a_right_sample():
    import torch

    tokenizer = addition_tokenizer()
    torch.manual_seed(0)
    model = addition_task._model(WarmUp(), tokenizer).eval()
    problem = torch.tensor([[3, 4, 7]])
    with torch.no_grad():
        logps, _ = addition_task._answer_logps(model, addition_task._encode(tokenizer, problem))
        first = model(torch.tensor([tokenizer("3+4=")["input_ids"]])).logits[0, -1].softmax(-1)
        second = model(torch.tensor([tokenizer("3+4=7")["input_ids"]])).logits[0, -1].softmax(-1)
    expected = first[tokenizer.get_vocab()["7"]] * second[tokenizer.eos_token_id]
    assert logps.sum().exp().item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_checkpoint_is_made_once_and_plain_transformers_loads_it(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = addition_model(SHORT)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 500_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert tokenizer("1+2=")["input_ids"] == addition_tokenizer()("1+2=")["input_ids"]
    assert tokenizer.padding_side == "left"
    out = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=2)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("1+2=")
    assert json.loads((folder / "warm_up.json").read_text())["steps"] == 1
    changed = folder.stat().st_mtime_ns
    assert addition_model(SHORT) == folder
    assert folder.stat().st_mtime_ns == changed


def test_another_warm_up_is_another_checkpoint(cache):
    assert addition_model(SHORT) != addition_model(WarmUp(target=0.0, seed=1))


def test_the_same_warm_up_gives_the_same_weights(cache):
    import shutil

    folder = addition_model(SHORT)
    first = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert (addition_model(SHORT) / "model.safetensors").read_bytes() == first


def test_an_interrupted_warm_up_leaves_nothing_that_looks_finished(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(addition_task, "_warm_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            addition_model(SHORT)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert addition_model(SHORT).is_dir()


def test_two_at_once_make_one_checkpoint(cache):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(addition_model, [SHORT, SHORT])
    assert first == second
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_the_random_state_of_the_caller_is_left_alone(cache):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    addition_model(SHORT)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_warm_up_that_does_not_arrive_is_an_error(cache):
    with pytest.raises(RuntimeError, match="reached 0% in 25 steps, not 100%"):
        addition_model(WarmUp(target=1.0, max_steps=25, batch_size=4))
