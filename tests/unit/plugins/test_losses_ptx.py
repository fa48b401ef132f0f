"""The next-token loss on texts of its own: what it reads, and what it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import Context
from hf_rlhf.testing import tiny_policy

EOS = 1


def context(seed: int = 0, process_index: int = 0) -> Context:
    policy, tokenizer = tiny_policy()
    return Context(
        device=torch.device("cpu"),
        tokenizer=tokenizer,
        policy=policy,
        seed=seed,
        process_index=process_index,
        num_processes=2,
    )


def ptx(path: Path, seed: int = 0, process_index: int = 0, **settings: Any) -> Any:
    term = load_plugin("loss_terms", "ptx", **{"path": str(path), "rows": 2, "max_tokens": 16, **settings})
    term.setup(context(seed, process_index))
    return term


def said(term: Any, steps: int) -> list[str]:
    """The texts of the first steps, each without its end-of-sequence token."""
    tokenizer = tiny_policy()[1]
    return [tokenizer.decode(ids, skip_special_tokens=True) for step in range(steps) for ids in term.texts(step)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo\n\n   \nthree\nfour\n")
    return file


@pytest.mark.proves("loss_terms.ptx", how="closed form", tolerance="1e-6")
def test_the_term_is_the_mean_next_token_loss_of_the_texts(lines: Path):
    """As the model's own loss on all texts at once gives it."""
    policy, term = tiny_policy()[0], ptx(lines, rows=4, coef=0.5)
    texts = term.texts(0)
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1.0] * (len(text) - 1) + [0.0] * (width - len(text)) for text in texts])
    logits = policy(ids, attention_mask=(torch.arange(width) < torch.tensor([[len(t)] for t in texts])).long()).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    loss = (term(logps, mask) * term.weights(mask)).sum()
    labels = torch.where(torch.arange(width) < torch.tensor([[len(t)] for t in texts]), ids, -100)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, 0.5 * want, rtol=1e-6, atol=1e-6)


def test_every_line_is_a_text_that_ends_and_comes_once_per_pass(lines: Path):
    term = ptx(lines)
    assert sorted(said(term, 2)) == ["four", "one", "three", "two"]
    assert said(term, 4) == 2 * said(term, 2)
    assert all(ids[-1] == EOS and ids.count(EOS) == 1 for step in range(4) for ids in term.texts(step))


def test_every_process_and_every_resumed_run_gets_the_same_texts(lines: Path):
    first = [ptx(lines).texts(step) for step in range(5)]
    assert [ptx(lines, process_index=1).texts(step) for step in (4, 3, 2, 1, 0)] == first[::-1]
    orders = {tuple(said(ptx(lines, seed=seed), 2)) for seed in range(6)}
    assert len(orders) > 1


def test_the_global_random_generators_are_left_alone(lines: Path):
    from hf_rlhf.conformance.common import equal, generators_now

    given, term = context(), load_plugin("loss_terms", "ptx", path=str(lines), max_tokens=16)
    before = generators_now()
    term.setup(given)
    assert equal(generators_now(), before)


def test_long_texts_are_cut_into_parts(tmp_path: Path):
    file = tmp_path / "texts.txt"
    file.write_text("abcdefgh\n")
    parts = ptx(file, rows=3, max_tokens=4).texts(0)
    # abcd efgh and the end of sequence, which is alone and predicts nothing
    assert sorted(map(len, parts)) == [4, 4, 4]
    assert {tuple(part) for part in parts} == {
        tuple(ptx(file, max_tokens=16).texts(0)[0][at : at + 4]) for at in (0, 4)
    }


def test_rows_of_jsonl_and_of_datasets_give_their_column(tmp_path: Path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "title": text[0]}) + "\n" for text in ("one", "two")))
    assert sorted(said(ptx(file), 1)) == ["one", "two"]
    assert sorted(said(ptx(file, column="title"), 1)) == ["o", "t"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(file.read_text())
    assert sorted(said(ptx(folder), 1)) == ["one", "two"]
    assert said(ptx(folder, split="train[:1]", rows=1), 1) == ["one"]


def test_a_missing_column_is_an_error_that_names_those_there_are(tmp_path: Path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"body": "a", "title": "b"}\n')
    with pytest.raises(ValueError, match=r"no text in column 'text'; its columns: body, title"):
        ptx(file)
    file.write_text('{"text": null}\n')
    with pytest.raises(ValueError, match="no text in column 'text'"):
        ptx(file)


def test_a_missing_file_is_refused_before_the_run(tmp_path: Path):
    algorithm: Any = None
    term = load_plugin("loss_terms", "ptx", path=str(tmp_path / "none.txt"))
    assert "no such file" in next(iter(term.check(algorithm)))
    assert not list(load_plugin("loss_terms", "ptx", path="someone/texts").check(algorithm))


def test_nothing_to_read_and_too_long_texts_are_errors(tmp_path: Path, lines: Path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no text of two or more tokens"):
        ptx(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="context of 256"):
        ptx(lines, max_tokens=257)
    with pytest.raises(RuntimeError, match="call setup"):
        load_plugin("loss_terms", "ptx", path=str(lines)).texts(0)
