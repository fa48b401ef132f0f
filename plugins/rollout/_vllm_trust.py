"""Bounds of the differences between log-probs of servers and trainer: at the probe of each load, and over a rollout.

In float32 both are compared with the setting `max_sampler_gap`. In half precision rounding alone differs, by an amount that
depends on the model: the first rollout, which follows a probe, is compared with the setting and measures it, and later ones
may differ by three times as much. A mixture of experts and an 8-bit cache differ by more than rounding: they only warn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_rlhf.axes import Context

    from ._vllm_server import Server

logger = logging.getLogger(__name__)

LEAST = 1e-3
"""Mean differences up to this one are accepted whatever the first one was."""
PROBES, ROLLOUTS = 10, 3
"""Times the first difference that a later probe, of a few tokens, and a later rollout may show."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Trust:
    """Bounds of the differences between log-probs of servers and trainer, in nats per token."""

    bound: float
    """The setting `max_sampler_gap`."""
    device: str
    autocast: torch.dtype | None
    """Dtype of the trainer's forwards where it is not that of the weights."""
    full_precision: bool
    """True if both compute in float32."""
    noisy: str | None = None
    """Reason for differences beyond rounding, which then only warn."""
    limit: float | None = field(default=None, init=False)
    """Bound of the next rollout, once it is known."""
    _first_probe: float | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.full_precision:
            self.limit = self.bound

    @classmethod
    def of(cls, context: Context, bound: float, servers: list[Server]) -> Trust:
        """Return the bounds for a policy and the servers that sample for it. Called in the trainer's autocast."""
        from ._vllm_checks import computed_in

        device, model = context.device.type, context.policy
        assert model is not None
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        caches = {str(server.facts["config"].get("cache_config", {}).get("cache_dtype")) for server in servers}
        noisy = None
        if any((getattr(model.config.get_text_config(), name, 0) or 0) > 1 for name in EXPERTS):
            noisy = "the policy is a mixture of experts, whose routing turns rounding into other experts"
        elif any(name.startswith("fp8") for name in caches):
            noisy = "the server caches keys and values in 8 bits"
        return cls(bound, device, autocast, computed_in(context) == "float32", noisy)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as the trainer's forwards do."""
        with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def probed(self, gap: float, version: str) -> None:
        """Check the difference in the probe of a load."""
        most = self.bound if self._first_probe is None else max(LEAST, PROBES * self._first_probe)
        self._check(
            gap,
            most,
            f"after the weights {version} were loaded, log-probs of server and trainer differ by {gap:.3g} nats per token, more "
            f"than {most:.3g}: the server did not load all of them, or computes another model",
        )
        self._first_probe = gap if self._first_probe is None else self._first_probe

    def rolled_out(self, gap: float) -> None:
        """Check the mean difference over a rollout; the first one in half precision sets the limit of the others."""
        most = self.bound if self.limit is None else self.limit
        name = "rollout.max_sampler_gap" if most == self.bound else "its limit, three times that of the first rollout,"
        self._check(
            gap,
            most,
            f"the log-probs of server and trainer differ by {gap:.3g} nats per token, more than {name}={most:.3g}: they do not "
            "compute the same model. Look at the server's log; max_sampler_gap=null only logs it",
        )
        if self.limit is None and self.noisy is None:
            self.limit = max(LEAST, ROLLOUTS * gap)

    def _check(self, gap: float, most: float, said: str) -> None:
        if gap <= most:
            return
        if self.noisy is None:
            raise RuntimeError(f"rollout=vllm: {said}")
        if not self._warned:
            logger.warning("rollout=vllm: %s. Training goes on: %s", said, self.noisy)
        self._warned = True


def remark(trust: Trust) -> Iterator[str]:
    """Yield what the plan says of the comparison."""
    if trust.noisy is not None:
        yield f"{trust.noisy}: rollout.max_sampler_gap only warns"
    elif not trust.full_precision:
        yield (
            "log-probs of server and trainer are compared in half precision: the first rollout may differ by "
            f"rollout.max_sampler_gap={trust.bound:g}, later ones by {ROLLOUTS} times the first one's"
        )
