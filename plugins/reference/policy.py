"""The policy itself, as it is when its log-probs are computed: for a reference that sees another prompt (`with_context`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class PolicyItself(Reference):
    """Log-probs of the current policy, without gradient. Needs no memory; alone its KL is 0."""

    name = "policy"
    words = "the policy itself"
    follows_policy = True

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if any(self is x for x in (algorithm.reference, *(kl.reference for kl in algorithm.kl))):
            yield (
                "the KL of the policy to itself is 0. Use it in a reference that sees another prompt, "
                "{use: with_context, of: policy, context: COLUMN}, or set use=frozen"
            )

    def build(self, policy: PreTrainedModel) -> None:
        return None

    def active(self, policy: PreTrainedModel) -> AbstractContextManager[None]:
        return nullcontext()


@hookimpl
def reference() -> list[type[Reference]]:
    return [PolicyItself]
