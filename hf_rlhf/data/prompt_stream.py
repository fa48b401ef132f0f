"""An endless, seeded, resumable stream of prompts, the same on every process."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from hf_rlhf.batch import Prompt
from hf_rlhf.data.fingerprints import RowHash

WINDOW = 1000
"""Size of the window in which a stream of unknown length is shuffled."""


class PromptStream:
    """Prompts of consecutive epochs, none dropped in between.

    `source` is a sequence, permuted in each epoch by (seed, epoch), or an iterable such as a streamed dataset, which each
    epoch restarts and shuffles in a window of 1,000. The trainer takes each process's share of what `next` returns.
    """

    def __init__(self, source: Sequence[Prompt] | Iterable[Prompt], *, seed: int = 0, shuffle: bool = True) -> None:
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._upcoming: Iterator[Prompt] | None = None
        self._consumed = RowHash()
        """Prompts that a stream gave in this epoch; a sequence is hashed whole when it is read."""
        if self.rows == 0:
            raise ValueError("the dataset has no prompts")

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
        if self._upcoming is None:
            self._upcoming = islice(self._order(), self._position, None)
        taken = list(islice(self._upcoming, n))
        self._position += len(taken)
        if self.rows is None:
            for prompt in taken:
                self._consumed.add(prompt.ids, prompt.prompt, prompt.columns)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position, in plain numbers, and for a stream the hash of what it gave in this epoch."""
        state = {"epoch": self._epoch, "position": self._position, "rows": self.rows, "seed": self._seed}
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
            self._position = min(state["position"], self.rows)
            return
        while self._position < state["position"] and self._take(min(WINDOW, state["position"] - self._position)):
            pass
        if same and "consumed" in state and self._consumed.hexdigest() != state["consumed"]:
            raise ValueError(
                f"dataset: the first {state['position']} prompts of the stream are not those that the checkpoint's run consumed"
            )

    def _order(self) -> Iterator[Prompt]:
        """Yield the prompts of this epoch from the first."""
        generator = random.Random(f"{self._seed}-{self._epoch}")
        if not isinstance(self._source, Sequence):
            return _shuffled(self._source, generator) if self._shuffle else iter(self._source)
        order = list(range(len(self._source)))
        if self._shuffle:
            generator.shuffle(order)
        return (self._source[index] for index in order)


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
