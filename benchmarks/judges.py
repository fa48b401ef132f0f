"""Models that the learning benchmark needs besides the quickstart's: reward models of three kinds, a policy that answers in
two lines, one that reads hints, and a teacher. Each is made once, in one to two minutes on one core, and kept in the
quickstart's cache.

    outcome   a sequence classifier, fitted to pairs of a right and a wrong answer by Bradley and Terry
    token     a token classifier, fitted to the same pairs by the sum of its scores over the answer
    process   a token classifier of two labels, fitted to whether each line of a two-line answer is right
    steps     the policy that the last one is for: `37+58=` is answered by `15\\n95`, the units' sum and the sum
    hinted    a policy that also knows `95;37+58=`, the problem behind its answer, and copies it
    teacher   the model that `hf-rlhf train quickstart` makes
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerBase,
)

from hf_rlhf.data.addition_task import SUMS, addition_dataset, addition_model, addition_tokenizer

Row = tuple[str, str]
"""A prompt and an answer."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """Settings for making a model. Different settings give different checkpoints."""

    kind: str
    start: str | None = None
    """The kind whose trunk it starts from; None: the quickstart's model."""
    target: float
    """Stopping criterion: accuracy on held-out pairs or lines; for a policy the probability of a correct answer."""
    batch_size: int = 128
    learning_rate: float = 1e-3
    """It rises over `ramp` steps and falls in a line to 0 at `max_steps`."""
    ramp: int = 20
    check_every: int = 25
    max_steps: int = 800
    pull: float = 0.01
    """Weight of (sum of a pair's scores) squared, which keeps scores near 0."""
    wrong: float = 0.3
    """Share of wrong lines in the policy's demonstrations."""
    seed: int = 0
    version: int = 3


MAKINGS = {
    "outcome": Making(kind="outcome", target=0.99),
    "token": Making(kind="token", target=0.99),
    "process": Making(kind="process", target=0.88, start="steps"),
    "steps": Making(kind="steps", target=0.35),
    "hinted": Making(kind="hinted", target=0.9, wrong=0.6, max_steps=2000),
    "teacher": Making(kind="teacher", target=0.9),
}


def judge(kind: str) -> Path:
    """Return the folder of the model of a kind, which is made if it is not cached."""
    making = MAKINGS[kind]
    start = addition_model() if making.start is None else judge(making.start)
    mark = hashlib.sha256(json.dumps([asdict(making), start.name]).encode()).hexdigest()[:12]
    folder = start.parent / f"judge-{kind}-{mark}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                (_train_quickstart if kind == "teacher" else _make)(making, start, unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def lines(row: dict[str, str]) -> list[str]:
    """Return the two lines of the correct answer to a problem."""
    a, b = row["prompt"].removesuffix("=").split("+")
    return [str(int(a) % 10 + int(b) % 10), str(int(a) + int(b))]


def spoiled(answer: str, draw: random.Random) -> str:
    """Return a wrong answer: any possible sum, or the correct one with a digit off by one, replaced, dropped or added."""
    while True:
        place, digit = draw.randrange(len(answer)), draw.choice("0123456789")
        near = str((int(answer[place]) + draw.choice((1, 9))) % 10)
        wrong = draw.choice(
            [
                str(draw.choice(SUMS)),
                answer[:place] + near + answer[place + 1 :],
                answer[:place] + near + answer[place + 1 :],
                answer[:place] + digit + answer[place + 1 :],
                answer[:place] + answer[place + 1 :],
                answer[: place + 1] + digit + answer[place + 1 :],
            ]
        )
        if wrong != answer:
            return wrong


def _make(making: Making, start: Path, folder: Path) -> None:
    """Trains a model until it meets its target and saves it. Raises `RuntimeError` where it does not."""
    draw, held_out = random.Random(making.seed), random.Random(1)
    tokenizer = addition_tokenizer()
    train, test = addition_dataset()
    fit = FITS[making.kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(making.seed)
        model = _model(making.kind, start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=making.learning_rate, betas=(0.9, 0.99))
        reached = 0.0
        for step in range(1, making.max_steps + 1):
            share = min(step / making.ramp, 1 - step / making.max_steps)
            optimizer.param_groups[0]["lr"] = making.learning_rate * share
            loss, _ = fit(making, model, tokenizer, draw.choices(train, k=making.batch_size), draw)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % making.check_every == 0:
                with torch.no_grad():
                    _, reached = fit(making, model, tokenizer, test, held_out)
                if reached >= making.target:
                    break
        else:
            raise RuntimeError(f"the {making.kind} model reached {reached:.3f}, not {making.target}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "making.json").write_text(json.dumps({**asdict(making), "steps": step, "reached": reached}, indent=1))


def _train_quickstart(making: Making, start: Path, folder: Path) -> None:
    """Train the quickstart's recipe and save the policy. Raises `RuntimeError` where its answers miss the target."""
    from transformers import PrinterCallback, TrainingArguments

    from hf_rlhf import RLHFTrainer, load_recipe
    from hf_rlhf.config.training_arguments import DEFAULTS

    recipe = load_recipe("quickstart")
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(scratch, use_cpu=True, **{**DEFAULTS, **recipe.training, "seed": making.seed})
        trainer = RLHFTrainer(None, recipe, args)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
            reached = trainer.evaluate()["eval_accuracy"]
        finally:
            trainer.close()
        if reached < making.target:
            raise RuntimeError(f"the teacher reached {reached:.3f}, not {making.target}")
        trainer.save_model(str(folder))
    (folder / "making.json").write_text(json.dumps({**asdict(making), "reached": reached}, indent=1))


def _model(kind: str, start: Path) -> Any:
    """Create a model with the warmed-up trunk and the head of a kind."""
    if kind in ("steps", "hinted"):
        return LlamaForCausalLM.from_pretrained(start)
    config = LlamaConfig.from_pretrained(start, num_labels=2 if kind == "process" else 1)
    cls: Any = LlamaForSequenceClassification if kind == "outcome" else LlamaForTokenClassification
    made = cls(config)
    made.model.load_state_dict(LlamaForCausalLM.from_pretrained(start).model.state_dict())
    return made


def _batch(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids and attention, padded on the right, and a mask (B, L) that is 1 on the answers' tokens."""
    texts = [prompt + answer for prompt, answer in rows]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    first = torch.tensor([[1 + len(prompt)] for prompt, _ in rows])  # <bos> stands in front, a token is a character
    places = torch.arange(batch["input_ids"].size(1))
    return dict(batch), (places >= first) * batch["attention_mask"]


def _pairs_fit(
    making: Making, model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], draw: random.Random
) -> tuple[Tensor, float]:
    """-logsigmoid(right - wrong) + pull (right + wrong)^2, of the scores that a completion has in total."""
    rows = [(p["prompt"], p["answer"]) for p in problems]
    rows += [(p["prompt"], spoiled(p["answer"], draw)) for p in problems]
    batch, mask = _batch(tokenizer, rows)
    logits = model(**batch).logits.squeeze(-1)
    right, wrong = (logits if making.kind == "outcome" else (logits * mask).sum(1)).chunk(2)
    loss = -torch.nn.functional.logsigmoid(right - wrong) + making.pull * (right + wrong) ** 2
    return loss.mean(), (right > wrong).float().mean().item()


def _lines_fit(
    making: Making, model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], draw: random.Random
) -> tuple[Tensor, float]:
    """Cross entropy of the labels at the line breaks: each line right or wrong, a third one always wrong."""
    rows, labels = [], []
    for problem in problems:
        right = lines(problem)
        given = [spoiled(line, draw) if draw.random() < 0.5 else line for line in right]
        labels.append([int(line == own) for line, own in zip(given, right, strict=True)])
        if draw.random() < 0.2:
            given.append(draw.choice(right))
            labels[-1].append(0)
        rows.append((problem["prompt"], "".join(f"{line}\n" for line in given)))
    batch, _ = _batch(tokenizer, rows)
    ends = batch["input_ids"] == tokenizer.convert_tokens_to_ids("\n")
    logits = model(**batch).logits[ends]
    wanted = torch.tensor([label for row in labels for label in row])
    return torch.nn.functional.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean().item()


def _policy_fit(
    making: Making, model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], draw: random.Random
) -> tuple[Tensor, float]:
    """Next-token loss on demonstrations, some of whose lines are random numbers; measured, on right answers, and their
    mean probability."""
    ranges, wrong = (range(19), SUMS), making.wrong if torch.is_grad_enabled() else 0.0
    rows = []
    for problem in problems:
        given = [
            str(draw.choice(numbers)) if draw.random() < wrong else line
            for line, numbers in zip(lines(problem), ranges, strict=True)
        ]
        rows.append((problem["prompt"], "\n".join(given) + tokenizer.eos_token))
    return _answers(model, tokenizer, rows)


def _hinted_fit(
    making: Making, model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], draw: random.Random
) -> tuple[Tensor, float]:
    """Next-token loss on answers, many of them random, and on as many copies of a hint; measured, on right hints, is the
    latter's mean probability."""
    hints = [str(draw.choice(SUMS)) if torch.is_grad_enabled() else problem["answer"] for problem in problems]
    rows = [
        (f"{hint};{problem['prompt']}", hint + tokenizer.eos_token)
        for hint, problem in zip(hints, problems, strict=True)
    ]
    copied = _answers(model, tokenizer, rows)
    answers = [str(draw.choice(SUMS)) if draw.random() < making.wrong else p["answer"] for p in problems]
    plain = _answers(
        model, tokenizer, [(p["prompt"], a + tokenizer.eos_token) for p, a in zip(problems, answers, strict=True)]
    )
    return copied[0] + plain[0], copied[1]


def _answers(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[Tensor, float]:
    """Return the mean loss of the answers' tokens, and the mean probability of an answer."""
    batch, mask = _batch(tokenizer, rows)
    logps = model(**batch).logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    logps = logps * mask[:, 1:]
    return -logps.sum() / mask[:, 1:].sum(), logps.sum(1).exp().mean().item()


FITS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "outcome": _pairs_fit,
    "token": _pairs_fit,
    "process": _lines_fit,
    "steps": _policy_fit,
    "hinted": _hinted_fit,
}
"""Kind -> the loss on some problems, and the share that the model judges, or the probability that it answers, rightly."""
