"""Checkpoints of value-headed causal models, as other libraries save them, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rlhf import load_plugin
from hf_rlhf.testing import rollouts
from tests.helpers.classifiers import configuration, direct, merging_tokenizer, save_model, save_sequence_classifier

CPU = torch.device("cpu")
TEXTS = ["12ab1", "x y", "ab12ab! 12"]
SOURCES = ["reward_model", "token_reward_model", "process_reward_model"]


def loaded(name: str, folder: str | Path, **settings: Any) -> Any:
    source = load_plugin("rewards", name, model=str(folder), **settings)
    source.load_model(CPU)
    return source


def linear(inputs: int = 16, outputs: int = 1, *, bias: bool = True, seed: int = 7) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias)


def save_headed(
    folder: Path, heads: dict[str, torch.Tensor], *, arch: str = "llama", files: str = "safetensors", **config: Any
) -> str:
    """A causal model's own weights and the head's, in one state dict under one configuration of a causal model."""
    folder.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_config(configuration(arch, pad_token_id=0))
    for name, value in config.items():
        setattr(model.config, name, value)
    state = {**model.state_dict(), **heads}
    if files == "safetensors":
        save_file({name: x.clone() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    if "architectures" not in config:
        model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "expected.pt")
    return str(folder)


def named(prefix: str, layer: nn.Linear) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": x.detach() for name, x in layer.state_dict().items()}


def states(folder: str | Path, text: str, arch: str = "llama") -> torch.Tensor:
    """(tokens, hidden): the last hidden states of the causal model whose weights were saved."""
    model = AutoModelForCausalLM.from_config(configuration(arch, pad_token_id=0)).eval()
    model.load_state_dict(torch.load(Path(folder) / "expected.pt"))
    ids = torch.tensor([merging_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]


def outcome(folder: str | Path, **settings: Any) -> list[float]:
    made = rollouts([""] * len(TEXTS))
    made.prompts, made.completions = [""] * len(TEXTS), list(TEXTS)
    return loaded("reward_model", folder, **settings)(made)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("prefix", "bias"),
    [("v_head.summary", True), ("score", False), ("value_head", False), ("regression_head", False)],
    ids=["TRL", "OpenRLHF", "OpenRLHF value_head", "UltraRM"],
)
def test_a_value_head_on_a_causal_model_scores_the_last_token(tmp_path, arch, files, prefix, bias):
    head = linear(bias=bias)
    folder = save_headed(tmp_path, named(prefix, head), arch=arch, files=files)
    tokenizer_changes_text = arch == "qwen2"
    scores = outcome(folder)
    for text, score in zip(TEXTS, scores, strict=True):
        if not (tokenizer_changes_text and "12" in text):
            assert score == pytest.approx(head(states(folder, text, arch))[-1].item(), rel=1e-5, abs=1e-6)


def test_it_scores_each_token_and_each_step_too(tmp_path):
    head = linear()
    folder = save_headed(tmp_path, named("v_head.summary", head))
    made = rollouts([""])
    made.prompts, made.completions = ["say "], ["12ab\n\nx"]
    values = head(states(folder, "say 12ab\n\nx"))[:, 0].tolist()
    (tokens,) = loaded("token_reward_model", folder)(made)
    assert [end for end, _ in tokens.values] == [2, 4, 6, 7]
    assert [x for _, x in tokens.values] == pytest.approx(values[-4:], abs=1e-6)
    (steps,) = loaded("process_reward_model", folder, value="log_odds")(made)
    last = head(states(folder, "say 12ab\n\nx\n\n"))[-1].item()
    assert steps.values == [(6, pytest.approx(values[-2], abs=1e-6)), (7, pytest.approx(last, abs=1e-6))]


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
def test_a_head_in_a_file_of_its_own_is_found(tmp_path, file):
    """As LLaMA-Factory saves it."""
    head = linear()
    folder = save_headed(tmp_path, {})
    state = named("v_head.summary", head)
    save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(state, tmp_path / file)
    assert outcome(folder) == pytest.approx([head(states(folder, text))[-1].item() for text in TEXTS], abs=1e-6)


def test_the_state_of_a_whole_wrapper_is_read(tmp_path):
    """`pretrained_model.` before each name of the causal model, as a wrapper's own state dict has it."""
    head = linear()
    folder = save_headed(tmp_path, {}, files="bin")
    state = torch.load(tmp_path / "pytorch_model.bin")
    wrapped = {f"pretrained_model.{name}": x for name, x in state.items()} | named("v_head.summary", head)
    torch.save(wrapped, tmp_path / "pytorch_model.bin")
    assert outcome(folder) == pytest.approx([head(states(folder, text))[-1].item() for text in TEXTS], abs=1e-6)


def test_a_head_of_two_layers_is_read_where_the_architecture_says_so(tmp_path):
    """As in Qwen2.5-Math-RM and Qwen2.5-Math-PRM: linear, ReLU, linear."""
    layers = nn.Sequential(linear(16, 16), nn.ReLU(), linear(16, 2, seed=8))
    heads = {f"score.{name}": x.detach() for name, x in layers.state_dict().items()}
    folder = save_headed(tmp_path, heads, architectures=["Qwen2ForProcessRewardModel"])
    made = rollouts([""])
    made.prompts, made.completions = ["say "], ["12ab"]
    logits = layers(states(folder, "say 12ab\n\n"))[-1]
    (steps,) = loaded("process_reward_model", folder)(made)
    assert steps.values == [(4, pytest.approx(logits.softmax(0)[1].item(), abs=1e-6))]


def test_its_own_mean_and_deviation_count_where_its_configuration_says_so(tmp_path):
    head = linear(bias=False)
    plain = save_headed(tmp_path / "plain", named("score", head), mean=2.0, std=4.0, normalize_reward=False)
    assert outcome(plain) == pytest.approx([head(states(plain, text))[-1].item() for text in TEXTS], abs=1e-6)
    normal = save_headed(tmp_path / "normal", named("score", head), mean=2.0, std=4.0, normalize_reward=True)
    expected = [(head(states(normal, text))[-1].item() - 2) / 4 for text in TEXTS]
    assert outcome(normal) == pytest.approx(expected, abs=1e-6)


def test_a_classifier_whose_configuration_counts_other_labels_than_its_head_has_is_read(tmp_path):
    """As OpenRLHF leaves it: one output, and the base model's two labels in the configuration."""
    folder = save_sequence_classifier(tmp_path, pad_token_id=0)
    expected = outcome(folder)
    config = Path(folder) / "config.json"
    two = config.read_text().replace('"0": "LABEL_0"', '"0": "LABEL_0", "1": "LABEL_1"')
    assert two != config.read_text()
    config.write_text(two)
    assert outcome(folder) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_head_is_computed_in_float32_at_least(tmp_path, dtype):
    head = linear()
    folder = save_headed(tmp_path, named("v_head.summary", head))
    source = loaded("reward_model", folder, dtype=dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert source._loaded.model.dtype == getattr(torch, dtype)
    assert source._loaded.model.score.weight.dtype == wide
    expected = [head(states(folder, text))[-1].item() for text in TEXTS]
    assert outcome(folder, dtype=dtype) == pytest.approx(expected, abs=1e-6 if dtype == "float64" else 0.1)


def test_a_critic_starts_from_the_trunk_and_the_head(tmp_path):
    from hf_rlhf_plugins.critic._modules import SeparateCritic

    head = linear()
    folder = save_headed(tmp_path, named("v_head.summary", head))
    source = loaded("reward_model", folder)
    policy = direct("CausalLM", folder)
    critic = SeparateCritic.from_model(source.fresh_model(CPU), policy)
    assert torch.equal(critic.head.weight, head.weight)
    assert torch.equal(critic.head.bias, head.bias)
    ids = torch.tensor([merging_tokenizer()("12ab")["input_ids"]])
    assert torch.equal(critic.trunk(input_ids=ids).last_hidden_state[0], states(folder, "12ab"))
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in source._loaded.model.parameters())


def test_what_nothing_here_reads_is_named(tmp_path):
    gated = named("score", linear()) | {"gating.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"a' has unsupported weights besides its head 'score': gating\.weight\."):
        outcome(save_headed(tmp_path / "a", gated))
    other = {"regression_layer.weight": torch.zeros(1, 16)}
    with pytest.raises(
        ValueError, match=r"no trained weights for score\.weight: .* but holds .*regression_layer\.weight"
    ):
        outcome(save_headed(tmp_path / "b", other))
    folder = save_headed(tmp_path / "c", named("v_head", linear()), files="bin")
    state = torch.load(tmp_path / "c" / "pytorch_model.bin")
    del state["model.norm.weight"]
    torch.save(state, tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"c' has a head 'v_head' but lacks parts of the trunk: norm\.weight\. Save the whole"
    ):
        outcome(folder)


def test_a_checkpoint_of_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = save_headed(tmp_path, {}, files="bin")
    torch.save({"v_head.summary.weight": Evil()}, tmp_path / "value_head.bin")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        outcome(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_two_tokens_of_a_causal_model_say_good_and_bad(tmp_path, arch, tied):
    """The other rows of the vocabulary are not computed; the logits are those of the whole model, softcap included."""
    folder = save_model(tmp_path, "AutoModelForCausalLM", arch, pad_token_id=0, tie_word_embeddings=tied)
    source = loaded("process_reward_model", folder, good_token="+", bad_token="-")
    assert source._loaded.model.get_output_embeddings().out_features == 2
    made = rollouts([""])
    made.prompts, made.completions = ["say "], ["12\n\nab\n\n"]
    tokenizer = merging_tokenizer()
    plus, minus = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "+-")
    ids = torch.tensor([tokenizer("say 12\n\nab\n\n")["input_ids"]])
    with torch.no_grad():
        logits = direct("CausalLM", folder)(input_ids=ids).logits[0]
    places = [len(tokenizer("say 12\n\n")["input_ids"]) - 1, ids.shape[1] - 1]
    expected = [logits[place][[plus, minus]].softmax(0)[0].item() for place in places]
    (steps,) = source(made)
    assert [end for end, _ in steps.values] == [4, 8]
    assert [x for _, x in steps.values] == pytest.approx(expected, rel=1e-5)
    (alone,) = loaded("process_reward_model", folder, good_token=plus, value="logit")(made)
    assert [x for _, x in alone.values] == pytest.approx([logits[place][plus].item() for place in places], abs=1e-6)


def test_good_and_bad_are_single_tokens_of_a_causal_model(tmp_path):
    folder = save_model(tmp_path / "lm", "AutoModelForCausalLM")
    with pytest.raises(
        ValueError,
        match=r"process_reward_model: 'good' must be one token of its tokenizer, got 4 .* Name one token, or its id",
    ):
        loaded("process_reward_model", folder, good_token="good", bad_token="-")
    with pytest.raises(ValueError, match="bad_token needs good_token"):
        loaded("process_reward_model", folder, bad_token="-")
    outcomes = save_sequence_classifier(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"rm' has no lm_head\.weight, but good_token needs a causal language model"):
        loaded("process_reward_model", outcomes, good_token="+", bad_token="-")
