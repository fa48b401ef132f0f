"""The embedded task: two-digit addition, and a small language model warmed up on noisy demonstrations of it.

Prompts read `37+58=`, answers `95`. 512 of the 8,100 problems are held out: neither the warm-up nor the training that
follows sees them. The warm-up is supervised fine-tuning on demonstrations of which half are wrong, from a fixed seed, until
about 36% of the model's samples are right: a policy with a signal and room to improve. It needs no network, runs once and
is cached (`$HF_RLHF_CACHE`, or `~/.cache/hf_rlhf`).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.cache import cache_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BUILTIN = "builtin:addition"
"""Value of `model.path` and `dataset.path` for this model and these problems."""
HELD_OUT = 512
SUMS = range(20, 199)
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Settings of the warm-up. Other settings make another checkpoint."""

    layers: int = 3
    hidden_size: int = 128
    intermediate_size: int = 384
    heads: int = 4
    batch_size: int = 128
    initializer_range: float = 0.06
    learning_rate: float = 1e-3
    ramp: int = 50
    """Steps of linear learning-rate warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    wrong: float = 0.5
    """Share of demonstrations whose answer is random."""
    target: float = 0.36
    """Probability of a right answer on training problems at which the warm-up stops."""
    check_every: int = 25
    max_steps: int = 3000
    seed: int = 0


def addition_dataset() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return all problems a + b with a, b in 10..99 in a fixed random order: 7,588 training rows and 512 held out."""
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random("addition").shuffle(problems)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in problems]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def addition_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character, which prepends `<bos>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [*sorted(set(string.printable) - set("\t\r\x0b\x0c")), "<unk>"]
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def addition_model(warm_up: WarmUp | None = None) -> Path:
    """Return the folder of the warmed-up model and its tokenizer, making them if they are not cached.

    Safe to call from several processes: one makes it and the others wait; an interrupted one leaves nothing behind.
    """
    warm_up = warm_up or WarmUp()
    return made_once("addition", warm_up, lambda tokenizer: _warm_up(warm_up, tokenizer))


def made_once(
    title: str, warm_up: WarmUp, make: Callable[[PreTrainedTokenizerFast], tuple[LlamaForCausalLM, dict[str, Any]]]
) -> Path:
    """Return the folder of a warmed-up model and its tokenizer; `make` returns the model, and what was measured."""
    from filelock import FileLock

    home = cache_folder()
    folder = home / f"{title}-{_fingerprint(warm_up)}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{folder.name}.lock"):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=home))
        try:
            tokenizer = addition_tokenizer()
            with doing(f"warming up the {title} model, once"):
                model, measured = make(tokenizer)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            (unfinished / "warm_up.json").write_text(json.dumps({**asdict(warm_up), **measured}, indent=2) + "\n")
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _fingerprint(warm_up: WarmUp) -> str:
    import tokenizers
    import torch
    import transformers

    versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
    return hashlib.sha256(json.dumps([asdict(warm_up), versions, 1]).encode()).hexdigest()[:12]


def _warm_up(warm_up: WarmUp, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Fine-tune on noisy demonstrations until samples are right with probability `target`."""
    import torch

    right = _sums(addition_dataset()[0])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        problems = right[torch.randint(len(right), (warm_up.batch_size,), generator=generator)]
        return _encode(tokenizer, _noisy(problems, warm_up.wrong, generator))

    return fine_tune("addition", warm_up, tokenizer, draw, _encode(tokenizer, right[: warm_up.batch_size * 4]))


def fine_tune(
    title: str,
    warm_up: WarmUp,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    fixed: tuple[Tensor, Tensor],
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Fine-tune a new model on drawn demonstrations until those of `fixed` have probability `target`.

    Demonstrations are ids (P, L) and a mask (P, L) that is 1 on tokens that are learned.
    """
    import torch

    generator = torch.Generator().manual_seed(warm_up.seed)
    with _one_thread(), torch.random.fork_rng(devices=[]), _progress(title, warm_up) as report:
        torch.manual_seed(warm_up.seed)
        model = _model(warm_up, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=warm_up.learning_rate, betas=warm_up.betas)
        probability = 0.0
        for step in range(1, warm_up.max_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = warm_up.learning_rate * min(1.0, step / warm_up.ramp)
            logps, mask = _answer_logps(model, draw(generator))
            (-logps.sum() / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % warm_up.check_every == 0:
                with torch.no_grad():
                    logps, _ = _answer_logps(model, fixed)
                probability = logps.sum(1).exp().mean().item()
                report(probability)
            if probability >= warm_up.target:
                break
        else:
            if warm_up.target > 0:
                raise RuntimeError(
                    f"the warm-up of the {title} model reached {probability:.0%} in {warm_up.max_steps} steps, "
                    f"not {warm_up.target:.0%}"
                )
    return model.eval(), {"steps": step, "probability": probability}


def addition_config(warm_up: WarmUp | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> LlamaConfig:
    """Return the configuration of `addition_model`."""
    from transformers import LlamaConfig

    warm_up, tokenizer = warm_up or WarmUp(), tokenizer or addition_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        initializer_range=warm_up.initializer_range,
        hidden_size=warm_up.hidden_size,
        intermediate_size=warm_up.intermediate_size,
        num_hidden_layers=warm_up.layers,
        num_attention_heads=warm_up.heads,
        num_key_value_heads=warm_up.heads,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _model(warm_up: WarmUp, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(addition_config(warm_up, tokenizer))


def _sums(rows: list[dict[str, str]]) -> Tensor:
    """Return (rows, 3) int: a, b, a + b."""
    import torch

    return torch.tensor([[*map(int, row["prompt"][:-1].split("+")), int(row["answer"])] for row in rows])


def _noisy(problems: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace the answer of a share of the rows, (P, 3), by a random possible sum."""
    import torch

    wrong = torch.rand(len(problems), generator=generator) < share
    noise = torch.randint(SUMS.start, SUMS.stop, (len(problems),), generator=generator)
    return torch.cat([problems[:, :2], torch.where(wrong, noise, problems[:, 2])[:, None]], 1)


def _encode(tokenizer: PreTrainedTokenizerFast, problems: Tensor) -> tuple[Tensor, Tensor]:
    """Encode (P, 3) as ids (P, L), right-padded, and a mask (P, L) that is 1 on the answer and its end of sequence."""
    return demonstrations(tokenizer, [[(f"{a}+{b}=", 0), (str(answer), 1)] for a, b, answer in problems.tolist()])


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, given: Iterable[Sequence[tuple[str, int]]]
) -> tuple[Tensor, Tensor]:
    """Encode rows of texts, each with 1 if it is learned, with its end of sequence, as ids (P, L), right-padded, and masks."""
    import torch

    rows, masks = [], []
    for parts in given:
        ids, mask = [tokenizer.bos_token_id], [0]
        for text, learned in parts:
            own = [*_ids(tokenizer, text), *([tokenizer.eos_token_id] if learned else [])]
            ids, mask = ids + own, mask + [learned] * len(own)
        rows.append(ids)
        masks.append(mask)
    longest = max(map(len, rows))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    return padded, torch.tensor([mask + [0] * (longest - len(mask)) for mask in masks], dtype=torch.float32)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    vocabulary = _vocabulary(tokenizer)
    return [vocabulary[character] for character in text]


@cache
def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return tokenizer.get_vocab()


def _answer_logps(model: torch.nn.Module, encoded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the (P, L-1) log-probs of the answers' tokens, 0 elsewhere, and their mask.

    A row's sum is the log-probability that a sample at temperature 1 is exactly that answer.
    """
    ids, mask = encoded
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logps * mask[:, 1:], mask[:, 1:]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: faster at this size, and the same checkpoint on any number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress(title: str, warm_up: WarmUp) -> Iterator[Any]:
    """Show a progress bar on a terminal, otherwise one line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    title = f"Warming up the {title} model"
    if not console.is_terminal:
        console.print(f"{title} (once; one to two minutes) ...")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[right]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{title} (once)", total=warm_up.target or None, right="")

        def report(probability: float) -> None:
            progress.update(task, completed=probability, right=f"right in {probability:.0%} of samples")

        yield report
