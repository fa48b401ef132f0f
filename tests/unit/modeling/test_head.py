"""The head a chunk at a time gives the numbers and gradients of a plain log_softmax, with a chunk of logits in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hf_rlhf import load_plugin
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.modeling import lm_head as module
from hf_rlhf.modeling.lm_head import Head, TokenStatistics, score
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.losses import derivative, policy_terms
from tests.helpers import stepping
from tests.helpers.live_tensors import LiveTensors
from tests.unit.plugins.test_losses import VARIANTS

N, H, V = 50, 6, 40
ALL = TokenStatistics(entropy=True, sum_sq_probs=True)
LIMITS = [1, 20 * V, 2**24]
"""Of the logits of a chunk: 16 (see `small`), 20 and all of N tokens at a time."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "temperature": {"temperature": 0.6},
    "tied": {"tied": True},
    "impossible tokens": {"bias": True, "impossible": True},
    "cap": {"cap": 3.0},
    "cap, impossible tokens": {"bias": True, "cap": 3.0, "scale": 2.0},
    "all": {"bias": True, "scale": 0.25, "temperature": 1.7, "tied": True, "impossible": True},
}
WANTED = [TokenStatistics(), TokenStatistics(entropy=True), TokenStatistics(sum_sq_probs=True), ALL]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks may be of 16 tokens."""
    monkeypatch.setattr(module, "TOKENS", 16)


def test_a_chunk_is_larger_on_a_gpu_and_never_a_few_tokens(monkeypatch):
    monkeypatch.undo()
    sizes = [module.tokens_at_a_time(v, torch.device(d)) for v in (4096, 151_936) for d in ("cpu", "cuda")]
    assert sizes == [1024, 65_536, 256, 1766]


class Setting:
    """States, sampled tokens and a head, drawn anew with the same numbers each time."""

    def __init__(
        self,
        n: int = N,
        dtype: torch.dtype = torch.float64,
        *,
        bias: bool = False,
        scale: float = 1.0,
        temperature: float = 1.0,
        cap: float | None = None,
        tied: bool = False,
        impossible: bool = False,
        vocabulary: int = V,
        hidden: int = H,
    ):
        draw = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(vocabulary, hidden, generator=draw))
            if bias:
                self.linear.bias.copy_(torch.randn(vocabulary, generator=draw))
            if impossible:
                self.linear.bias[::3] = float("-inf")
        self.head, self.temperature = Head(self.linear, scale, cap), temperature
        targets = torch.randint(vocabulary // 3, (n,), generator=draw)
        self.targets = targets * 3 + 1 if impossible else targets
        if tied:
            self.states = self.linear.weight[(targets * 7) % vocabulary].tanh()
            self.leaves = [self.linear.weight]
        else:
            self.states = torch.randn(n, hidden, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
            self.leaves = [self.states, self.linear.weight]
        self.leaves += [self.linear.bias] if bias else []

    def score(self, wanted: TokenStatistics = ALL, **options: Any) -> dict[str, Tensor]:
        return score(self.head, self.states, self.targets, self.temperature, wanted, **options)

    def textbook(self, wanted: TokenStatistics = ALL) -> dict[str, Tensor]:
        logits = self.linear(self.states) * self.head.scale
        if self.head.cap is not None:
            logits = self.head.cap * torch.tanh(logits / self.head.cap)
        log_p = (logits / self.temperature).log_softmax(-1)
        p = log_p.exp()
        found = {
            "logps": log_p.gather(1, self.targets[:, None])[:, 0],
            "entropy": -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1),
            "sum_sq_probs": (p**2).sum(-1),
        }
        return {name: found[name] for name in wanted.names}

    def gradients(self, found: dict[str, Tensor], names: list[str]) -> list[Tensor]:
        """Of a weighed sum of the numbers `names`, by states, weight and bias."""
        total = torch.stack([(found[name] * factors(found[name], name)).sum() for name in names]).sum()
        return list(torch.autograd.grad(total, self.leaves, retain_graph=True))


def factors(x: Tensor, name: str) -> Tensor:
    return torch.linspace(-1, 2, len(x), dtype=x.dtype) * {"logps": 1.0, "entropy": 0.7, "sum_sq_probs": -1.3}[name]


def assert_close(found: list[Tensor], due: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, due, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_of_log_softmax(case, limit, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", limit)
    for wanted in WANTED:
        setting = Setting(**CASES[case])
        found, due = setting.score(wanted), setting.textbook(wanted)
        assert list(found) == list(due)
        assert_close(list(found.values()), list(due.values()))
        for names in (list(due), list(due)[-1:]):
            gradients = setting.gradients(found, names)
            assert_close(gradients, setting.gradients(due, names))
            assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("case", ["bias", "cap"])
@pytest.mark.parametrize("fused", [False, True])
def test_no_token_gives_no_number_and_a_gradient_of_zero(case, fused):
    setting = Setting(n=0, **CASES[case])
    found = setting.score(derivative=(lambda values, part: values) if fused else None)
    assert all(found[name].shape == (0,) for name in ALL.names)
    total = found["loss"] if "loss" in found else sum(found[name].sum() for name in ALL.names)
    gradients = torch.autograd.grad(total, setting.leaves)
    assert all(bool((g == 0).all()) for g in gradients)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    due = Setting(bias=True)
    setting = Setting(bias=True)
    setting.leaves[frozen].requires_grad_(False)
    setting.leaves.pop(frozen)
    kept = [g for i, g in enumerate(due.gradients(due.textbook(), ALL.names)) if i != frozen]
    assert_close(setting.gradients(setting.score(), ALL.names), kept)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("limit", LIMITS)
def test_bfloat16_weights_give_the_numbers_of_a_bfloat16_forward(limit, bias, monkeypatch):
    """Logits are rounded once, as its own forward rounds them, and read in float32."""
    monkeypatch.setattr(module, "LOGITS", limit)
    setting = Setting(dtype=torch.bfloat16, bias=bias)
    found = setting.score()
    log_p = setting.linear(setting.states).float().log_softmax(-1)
    p = log_p.exp()
    due = [log_p.gather(1, setting.targets[:, None])[:, 0], -(p * log_p).sum(-1), (p**2).sum(-1)]
    assert all(x.dtype == torch.float32 for x in found.values())
    assert_close(list(found.values()), due, 2e-6)
    named = dict(zip(ALL.names, due, strict=True))
    for a, b in zip(setting.gradients(found, ALL.names), setting.gradients(named, ALL.names), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).float().norm() < 0.02 * b.float().norm()


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_rounds_the_logits_and_nothing_else(fused):
    """Entropy and sum of squares are sums of many small numbers: they are taken in float32."""
    setting = Setting(dtype=torch.float32, vocabulary=2000)
    seen: dict[str, Tensor] = {}

    def notes(values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
        seen.update(values)
        return values

    with torch.autocast("cpu", torch.bfloat16):
        found = setting.score(derivative=notes if fused else None)
        log_p = setting.linear(setting.states).float().log_softmax(-1)
    p = log_p.exp()
    due = [log_p.gather(1, setting.targets[:, None])[:, 0], -(p * log_p).sum(-1), (p**2).sum(-1)]
    assert_close([found[name] for name in ALL.names], due, 1e-5)
    assert_close([seen[name] for name in ALL.names] if fused else [], due if fused else [], 1e-5)


def test_impossible_tokens_have_no_share_in_what_is_measured_chunk_by_chunk():
    setting = Setting(**CASES["impossible tokens"])
    found, due = setting.score(measures={"most": lambda log_probs, part: log_probs.amax(-1)}), setting.textbook()
    assert_close([found[name] for name in ALL.names], list(due.values()))
    assert_close(setting.gradients(found, ALL.names), setting.gradients(due, ALL.names))


def test_a_measure_of_whole_distributions_is_handed_each_chunk_once(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 20 * V)
    setting, parts = Setting(), []

    def most(log_probs: Tensor, part: slice) -> Tensor:
        parts.append((part.start, part.stop, log_probs.size(0)))
        return log_probs.amax(-1)

    with torch.no_grad():
        found = setting.score(measures={"most": most})
        due = setting.linear(setting.states).log_softmax(-1).amax(-1)
    assert parts == [(0, 20, 20), (20, 40, 20), (40, 50, 10)]
    assert_close([found["most"]], [due])


# Memory


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() // x.element_size() for x in tree_iter(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return out


def run_head(case: dict[str, Any], wanted: TokenStatistics, fused: bool, n: int = 400) -> tuple[int, int]:
    """Most elements of a tensor and most bytes at a time, above what was there, of forward and backward."""
    setting = Setting(n=n, dtype=torch.float32, vocabulary=300, **case)
    with LiveTensors() as live, Largest() as largest:
        found = setting.score(wanted, derivative=(lambda values, part: values) if fused else None)
        total = found["loss"] if "loss" in found else torch.stack([x.sum() for x in found.values()]).sum()
        total.backward()
    return largest.elements, live.peak


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("case", ["plain", "bias", "scale", "cap"])
def test_no_tensor_is_larger_than_a_chunk(case, wanted, fused, monkeypatch):
    """400 tokens of a vocabulary of 300 would be 120 000 logits."""
    for limit in (16 * 300, 50 * 300):
        monkeypatch.setattr(module, "LOGITS", limit)
        elements, _ = run_head(CASES[case], wanted, fused)
        assert 300 * H < elements <= limit


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_two_chunks_are_held_however_many_tokens_there_are(wanted, fused, monkeypatch):
    """One where the log-prob alone is asked for and its gradient comes later; beside them what is as large as the states,
    the weight and the numbers themselves."""
    tiles = 1 if wanted == TokenStatistics() and not fused else 2
    limit = 50 * 300
    monkeypatch.setattr(module, "LOGITS", limit)
    for n in (400, 1600):
        _, held = run_head({}, wanted, fused, n)
        others = 4 * (4 * n * H + 4 * 300 * H + 16 * n)
        assert held < 4 * tiles * limit + others


# The derivative of the loss, known in the forward

TOKEN_LEVEL = [(n, s) for n, s in VARIANTS if load_plugin("policy_loss", n, **s).token_level]
BETAS = {"k1": 0.1, "k2": 0.2, "k3": 0.3}
SAMPLED = [([5, 6], [7, 8, 9, 10], [1, 0, 1, 1]), ([5, 6], [11, 12], [1, 1]), ([13], [14, 15, 16], [1, 1, 1])]


def algorithm(name: str, settings: dict[str, Any], **parts: Any) -> Algorithm:
    spec = {**stepping.DEFAULTS["algorithm"], "policy_loss": {"use": name, **settings}, **parts}
    return stepping.make_algorithm(spec, {"mini_batches": 2})


def micro_batch(logps: Tensor, a: Algorithm) -> dict[str, Any]:
    """Inputs of a micro-batch: old and reference log-probs apart from `logps`, a correction, uneven weights."""
    prompts, completions, masks = zip(*SAMPLED, strict=True)
    mask = nn.utils.rnn.pad_sequence([torch.tensor(row).double() for row in masks], batch_first=True)
    draw = torch.Generator().manual_seed(1)

    def around(x: Tensor | float, spread: float) -> Tensor:
        return (x + spread * (2 * torch.rand(mask.shape, generator=draw, dtype=torch.float64) - 1)) * mask

    inputs = {
        "batch": TokenBatch(prompts, completions, mask, pad=0),
        "mask": mask,
        "weights": around(0.5, 0.4),
        "advantages": around(0.0, 1.0),
        "old_logps": around(logps, 0.8),
        "ref_logps": around(logps, 0.5),
        "sampler_logps": around(logps, 0.5),
        "correction": around(1.0, 0.5),
        "total_score": torch.tensor([1.0, -1.0, 0.5]).double(),
    }
    if "selected" in a.policy_loss.needs:
        inputs["selected"] = (around(0.0, 1.0) > 0).double() * mask
    return inputs


@pytest.mark.parametrize("kl", [None, "k2", "k3"])
@pytest.mark.parametrize(("name", "settings"), TOKEN_LEVEL, ids=str)
def test_the_loss_in_one_pass_of_the_head_is_that_of_two(name, settings, kl, monkeypatch):
    """Terms of the loss, what is measured and gradients, in chunks and with a factor on the loss."""
    in_loss = [] if kl is None else [{"use": "in_loss", "beta": BETAS[kl], "estimator": kl, "clamp": 0.3}]
    a = algorithm(name, settings, kl=in_loss, reference="frozen" if in_loss else "none")
    assert a.loss_is_fused
    monkeypatch.setattr(module, "tokens_at_a_time", lambda *_: 3)
    model = tiny_policy(dtype=torch.float64)[0]
    policy = ActorCritic(model, None, 0.9)
    with torch.no_grad():
        inputs = micro_batch(policy(micro_batch(torch.zeros(3, 4), a)["batch"])["logps"], a)

    def run(fused: bool) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
        meters = MetricAggregator()
        new = policy(inputs["batch"], entropy=True, derivative=derivative(a, inputs) if fused else None)
        loss = new.pop("loss", None)
        terms = policy_terms(a, new, inputs, meters)
        total = 3 * (torch.stack(list(terms.values())).sum() if loss is None else loss)
        gradients = torch.autograd.grad(total, list(model.parameters()))
        return [x.detach() for x in terms.values()], list(gradients), meters.state_dict()["sums"]

    (terms, gradients, measured), (due, by_two, also) = run(True), run(False)
    assert_close(terms, due)
    assert_close(gradients, by_two, 1e-6)  # the model's norms round to float32
    assert_close([gradients[-1]], [by_two[-1]])
    assert max(g.abs().max() for g in gradients) > 1e-3
    assert measured.keys() == also.keys()
    for title, numbers in measured.items():
        assert [float(x) for x in numbers] == pytest.approx([float(x) for x in also[title]], abs=1e-12)


@pytest.mark.parametrize(
    "parts",
    [
        {"kl": [{"use": "in_loss", "level": "sequence", "estimator": "k2"}]},
        {"kl": [{"use": "in_loss", "estimator": "exact"}]},
        {"loss_terms": ["entropy"]},
        {"policy_loss": {"use": "gspo"}},
    ],
    ids=["kl of a row", "kl of distributions", "loss term", "loss of a row"],
)
def test_what_looks_beyond_a_token_takes_the_long_way(parts):
    a = algorithm("ppo_clip", {}, **{"reference": "frozen" if "kl" in parts else "none", **parts})
    assert not a.loss_is_fused


# What policy losses declare

SHAPE = (6, 9)


def far_apart(seed: int, spread: float) -> dict[str, Tensor]:
    """Log-probs up to `spread` nats from the old ones; rows 1 and 4 have no advantage."""
    draw = torch.Generator().manual_seed(seed)

    def rand() -> Tensor:
        return torch.rand(SHAPE, generator=draw, dtype=torch.float64)

    mask = (rand() > 0.2).double()
    mask[:, 0] = 1
    logps = -4 * rand()
    advantages = (2 * rand() - 1) * mask
    advantages[[1, 4]] = 0
    return {
        "logps": logps,
        "old_logps": logps + spread * (2 * rand() - 1),
        "advantages": advantages,
        "mask": mask,
        "selected": (rand() > 0.5).double() * mask,
        "old_entropy": rand(),
        "sampler_logps": logps + spread * (2 * rand() - 1),
        "total_score": 2 * rand()[:, 0] - 1,
    }


def call(plugin: Any, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    extras = {name: t[name] for name in plugin.needs - {"old_logps"}}
    found: tuple[Tensor, dict[str, Tensor]] = plugin(t["logps"], t["old_logps"], t["advantages"], t["mask"], **extras)
    return found


@pytest.mark.parametrize("spread", [0.1, 1.0, 40.0])
@pytest.mark.parametrize(("name", "settings"), TOKEN_LEVEL, ids=str)
def test_a_loss_that_says_so_looks_at_each_token_alone(name, settings, spread):
    """The same tokens in one row, in another order, give the same losses, slopes and metrics."""
    plugin, t = load_plugin("policy_loss", name, **settings), far_apart(0, spread)
    order = torch.randperm(t["mask"].numel(), generator=torch.Generator().manual_seed(3))
    flat = {n: x.flatten()[order].unsqueeze(0) if x.shape == SHAPE else x for n, x in t.items()}
    results = []
    for tensors in (t, flat):
        tensors["logps"].requires_grad_()
        loss, metrics = call(plugin, tensors)
        (slope,) = torch.autograd.grad(loss.sum(), tensors["logps"])
        results.append([loss.detach(), slope, *metrics.values()])
    for together, scattered in zip(*results, strict=True):
        torch.testing.assert_close(together.flatten()[order], scattered[0], rtol=1e-12, atol=0)
    assert results[0][1].norm() > 0


@pytest.mark.parametrize("spread", [0.1, 1.0, 40.0])
@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_a_loss_that_says_so_has_no_gradient_where_there_is_no_advantage(name, settings, spread):
    """Exactly none, and none of its rows changes another's; the other losses have one."""
    plugin, t = load_plugin("policy_loss", name, **settings), far_apart(1, spread)
    t["logps"].requires_grad_()
    weights = torch.linspace(0.1, 1, t["mask"].numel(), dtype=torch.float64).view(SHAPE)
    (slope,) = torch.autograd.grad((call(plugin, t)[0] * weights).sum(), t["logps"])
    assert slope.isfinite().all()
    assert bool((slope[[1, 4]] == 0).all()) == plugin.zero_without_advantage
    live = {n: x.detach()[[0, 2, 3, 5]] for n, x in t.items()}
    live["logps"].requires_grad_()
    (alone,) = torch.autograd.grad((call(plugin, live)[0] * weights[[0, 2, 3, 5]]).sum(), live["logps"])
    torch.testing.assert_close(alone, slope[[0, 2, 3, 5]], rtol=1e-12, atol=0)
    assert alone.norm() > 0
