"""An endless, seeded, resumable stream of prompts, the same on every process."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from hf_rlhf.batch import Prompt
from hf_rlhf.contract.prompt_sampler import PromptSampler
from hf_rlhf.data.fingerprints import RowHash

WINDOW = 1000
"""Size of the window in which a stream of unknown length is shuffled."""


def order_problem(sampler: PromptSampler, *, streamed: bool, shuffle: bool) -> str:
    """Return why a sampler cannot choose the rows of a dataset, with the fix; empty if it can, or need not."""
    if not sampler.random_access or (shuffle and not streamed):
        return ""
    why, fix = (
        (
            "a stream has no random access to its rows",
            "dataset.streaming=false (in Python: pass a datasets.Dataset or a list)",
        )
        if streamed
        else ("dataset.shuffle=false keeps the order of the rows", "dataset.shuffle=true")
    )
    return f"sampler={sampler.name} chooses rows and {why}. Set {fix}, or sampler.use=shuffled"


class PromptStream:
    """Prompts of consecutive epochs, none dropped in between.

    `source` is a sequence, whose rows the sampler of the recipe chooses, or an iterable such as a streamed dataset, which each
    epoch restarts and shuffles in a window of 1,000. Without a sampler, and with `shuffle` off, the order is that of the source.
    The trainer takes each process's share of what `next` returns.
    """

    def __init__(
        self,
        source: Sequence[Prompt] | Iterable[Prompt],
        *,
        seed: int = 0,
        shuffle: bool = True,
        sampler: PromptSampler | None = None,
    ) -> None:
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self._sampler = sampler if shuffle and self.rows is not None else None
        self._epoch = 0
        self._position = 0
        self._upcoming: Iterator[Any] | None = None
        self._consumed = RowHash()
        """Prompts that a stream gave in this epoch; a sequence is hashed whole when it is read."""
        self._drawn: list[int] = []
        """Row numbers since the last rollout began."""
        if self.rows == 0:
            raise ValueError("the dataset has no prompts")
        if sampler is not None and (problem := order_problem(sampler, streamed=self.rows is None, shuffle=shuffle)):
            raise ValueError(problem)

    @property
    def rows(self) -> int | None:
        """Prompts in an epoch; None for a stream."""
        return len(self._source) if isinstance(self._source, Sequence) else None

    @property
    def epoch(self) -> float:
        """Epochs so far, with the fraction of the current one if its length is known."""
        return self._epoch + (self._position / self.rows if self.rows else 0)

    def next(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts."""
        prompts: list[Prompt] = []
        while len(prompts) < n:
            taken = self._take(n - len(prompts))
            prompts += taken
            if len(prompts) < n:
                if self._position == 0:
                    raise ValueError("the dataset has no prompts: its stream ended before the first one")
                self._begin_epoch(self._epoch + 1)
        return prompts

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._position, self._upcoming, self._consumed = epoch, 0, None, RowHash()

    def _take(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts of this epoch, or what is left of it."""
        if not isinstance(self._source, Sequence):
            if self._upcoming is None:
                generator = self._generator()
                order = _shuffled(self._source, generator) if self._shuffle else iter(self._source)
                self._upcoming = islice(order, self._position, None)
            taken = list(islice(self._upcoming, n))
            for prompt in taken:
                self._consumed.add(prompt.ids, prompt.prompt, prompt.columns)
        else:
            numbers = self._numbers(min(n, len(self._source) - self._position))
            taken = [self._source[number] for number in numbers]
            self._drawn += numbers
        self._position += len(taken)
        return taken

    def _numbers(self, n: int) -> list[int]:
        """Return the next `n` row numbers of this epoch of a sequence."""
        rows = len(self._source)  # type: ignore[arg-type]
        if self._sampler is not None:
            found = [int(number) for number in self._sampler.next(n, rows, self._generator())] if n else []
            if len(found) != n or not all(0 <= number < rows for number in found):
                raise ValueError(
                    f"sampler={self._sampler.name} must return {n} row numbers from 0 to {rows - 1}, got {found[:10]}"
                )
            return found
        if self._upcoming is None:
            order = list(range(rows))
            if self._shuffle:
                self._generator(0).shuffle(order)
            self._upcoming = islice(order, self._position, None)
        return list(islice(self._upcoming, n))

    def _generator(self, position: int | None = None) -> random.Random:
        """Return a generator seeded by run, epoch and position; at the beginning of an epoch by run and epoch."""
        position = self._position if position is None else position
        return random.Random(f"{self._seed}-{self._epoch}" + (f"-{position}" if position else ""))

    def begin_rollout(self) -> None:
        """Forget the rows of the rollout before; `observe` counts from here."""
        self._drawn = []

    @property
    def observed(self) -> bool:
        """True if the sampler reads scores."""
        return self._sampler is not None and type(self._sampler).observe is not PromptSampler.observe

    def observe(self, drawn: Sequence[int], scores: Sequence[float]) -> None:
        """Let the sampler observe the score of each completion, of the prompt that was number `drawn` of this rollout."""
        if self._sampler is not None:
            self._sampler.observe([self._drawn[i] for i in drawn], scores)

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position, in plain numbers, the sampler's state, and for a stream the hash of what it gave in this
        epoch."""
        state: dict[str, Any] = {
            "epoch": self._epoch,
            "position": self._position,
            "rows": self.rows,
            "seed": self._seed,
        }
        state |= {} if self._sampler is None else {"sampler": self._sampler.state_dict()}
        return state | ({"consumed": self._consumed.hexdigest()} if self.rows is None else {})

    def load_state_dict(self, state: dict[str, Any], same: bool = True) -> None:
        """Go to a saved position. Raises `ValueError` if it belongs to another stream; `same=False` accepts other prompts."""
        for name, here in (("rows", self.rows), ("seed", self._seed)):
            if state[name] != here and (same or name == "seed"):
                raise ValueError(
                    f"dataset: the prompts have changed since the checkpoint: {name} was {state[name]}, now {here}"
                )
        self._begin_epoch(state["epoch"])
        if self.rows is not None:
            position = min(state["position"], self.rows)
            if self._sampler is not None:
                self._sampler.load_state_dict(state.get("sampler", {}))
                if not self._sampler.state_dict():
                    self._numbers(position)
            self._position = position
            return
        while self._position < state["position"] and self._take(min(WINDOW, state["position"] - self._position)):
            pass
        if same and "consumed" in state and self._consumed.hexdigest() != state["consumed"]:
            raise ValueError(
                f"dataset: the first {state['position']} prompts of the stream are not those that the checkpoint's run consumed"
            )


def _shuffled(source: Iterable[Prompt], generator: random.Random) -> Iterator[Prompt]:
    """Yield each prompt once, drawn from the next `WINDOW`."""
    window: list[Prompt] = []
    for prompt in source:
        if len(window) < WINDOW:
            window.append(prompt)
            continue
        index = generator.randrange(WINDOW)
        window[index], drawn = prompt, window[index]
        yield drawn
    generator.shuffle(window)
    yield from window
