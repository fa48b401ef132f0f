"""Costs of a judge: tokens and money per row, and totals."""

from __future__ import annotations

from typing import Any


class Costs:
    """Counter of tokens and costs; prices are per million tokens, and `kept` says that replies are cached."""

    def __init__(self, prompt_price: float | None, completion_price: float | None, kept: bool) -> None:
        self._prices = (prompt_price, completion_price)
        self._kept = kept
        self._rows: dict[str, list[float]] = {}
        self.totals = {"tokens_total": 0.0, "cost_total": 0.0}

    def paid(self, usage: Any) -> None:
        """Count a requested row with the server's `usage`; 0 tokens if the server reports none."""
        usage = usage if isinstance(usage, dict) else {}
        self._count(0.0, *(_tokens(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")))

    def found(self) -> None:
        """Count a row whose reply was cached."""
        self._count(1.0, 0.0, 0.0)

    def take(self) -> dict[str, list[float]]:
        """Return metrics of the rows since the last call, and totals; empty if there were no rows."""
        rows, self._rows = self._rows, {}
        if not rows:
            return {}
        return rows | {name: [x] for name, x in self.totals.items() if self._priced or name != "cost_total"}

    @property
    def _priced(self) -> bool:
        return self._prices != (None, None)

    def _count(self, cached: float, *tokens: float) -> None:
        cost = sum((price or 0.0) * n / 1e6 for price, n in zip(self._prices, tokens, strict=True))
        found = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True))
        found |= {"cost": cost} if self._priced else {}
        found |= {"cached": cached} if self._kept else {}
        for name, number in found.items():
            self._rows.setdefault(name, []).append(number)
        self.totals["tokens_total"] += sum(tokens)
        self.totals["cost_total"] += cost


def _tokens(reported: Any) -> float:
    """Return a number of tokens; 0 for what is none."""
    return float(reported) if isinstance(reported, int | float) and 0 <= reported < 1e12 else 0.0
