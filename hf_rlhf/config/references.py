"""References of an algorithm: the recipe's, and those of single KLs, each distinct one once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf.axes import KLPlacement, Reference

Algorithm = Any
"""`hf_rlhf.config.algorithm.Algorithm`, which imports this module."""
RECIPE = ""
"""Key of the recipe's reference; that of another is the title of the first KL that has it."""
ROWS = "rows:"
"""Prefix of the masks (B, T) of KLs that are taken on some rows only."""
EARLY = frozenset({"reward", "advantage"})
"""Places where a KL enters before the first update."""


BEHIND = "batch_behind:"
"""Prefix, before a reference's key, of a micro-batch's rows behind that reference's prompts. The policy's own is `batch`."""


def keyed(name: str, key: str) -> str:
    """Return the name of a tensor of the reference with this key: `ref_logps` is the recipe's."""
    return f"{name}:{key}" if key else name


@dataclass(kw_only=True)
class ReferenceUse:
    """Uses of one reference by an algorithm."""

    reference: Reference
    needs: frozenset[str] = frozenset()
    """Scores that are computed once per rollout: logps, top_logps."""
    top_k: int | None = None
    readers: list[str] = field(default_factory=list)
    """Titles of the KLs that are measured against it."""
    rollout: list[tuple[str, KLPlacement]] = field(default_factory=list)
    """KLs over distributions that are measured in the rollout, by title."""
    update: list[tuple[str, KLPlacement]] = field(default_factory=list)
    """The same in the update."""

    @property
    def in_update(self) -> bool:
        """True if the update runs it, for whole distributions."""
        return any(top_k_of(kl) is None for _, kl in self.update)

    @property
    def in_rollout(self) -> bool:
        """True if it is run over each rollout."""
        return bool(self.needs or self.rollout)


def top_k_of(kl: KLPlacement) -> int | None:
    """Return how many of the reference's likeliest tokens the estimator compares; None: the whole distributions."""
    return getattr(kl.estimator, "top_k", None)


def key_of(a: Algorithm, kl: KLPlacement) -> str:
    """Return the key of the reference of a KL: equal ones have one key."""
    if kl.reference is None or ("ref_logps" in a.needs and kl.reference == a.reference):
        return RECIPE
    return next(title for title, other in a.titled("kl") if other.reference == kl.reference)


def references_of(a: Algorithm) -> dict[str, ReferenceUse]:
    """Return key -> what is read of each distinct reference, the recipe's first."""
    found: dict[str, ReferenceUse] = {}
    if "ref_logps" in a.needs:
        found[RECIPE] = ReferenceUse(reference=a.reference, needs=frozenset({"logps"}))
    moments = {moment: a.kl_over_distributions(moment) for moment in ("rollout", "update")}
    for title, kl in a.titled("kl"):
        use = found.setdefault(key_of(a, kl), ReferenceUse(reference=kl.reference or a.reference))
        use.readers.append(title)
        if (
            "full_distribution" not in kl.estimator.needs
            or "ref_logps" in getattr(kl, "controller", kl.estimator).needs
        ):
            use.needs |= {"logps"}
        if "full_distribution" not in kl.estimator.needs:
            continue
        for moment, compared in moments.items():
            getattr(use, moment).extend([(title, kl)] if (title, kl) in compared else [])
        if (k := top_k_of(kl)) is not None:
            use.needs |= {"top_logps"}
            use.top_k = max(k, use.top_k or 0)
    return found


def bases_of(a: Algorithm) -> dict[str, Reference]:
    """Return label -> reference of each distinct model: `reference`, or `reference.TITLE` for the model of a KL."""
    found: dict[str, Reference] = {}
    for key, use in references_of(a).items():
        if use.reference.base not in found.values():
            found[f"reference.{key}" if key else "reference"] = use.reference.base
    return found


def base_label(a: Algorithm, reference: Reference) -> str:
    """Return the label of the model that a reference scores with."""
    return next(label for label, base in bases_of(a).items() if base == reference.base)


def drifts(a: Algorithm) -> dict[str, tuple[str, str]]:
    """Return title -> (name of its log-probs, name of the mask of its rows) of each KL with a reference of its own of which the
    log-probs of sampled tokens are known, as those of the policy that rolled out."""
    keys = {title: key_of(a, kl) for title, kl in a.titled("kl")} if a.readers_of_old_logps else {}
    return {
        title: (keyed("ref_logps", key), f"{ROWS}{title}")
        for title, key in keys.items()
        if key and "logps" in a.references[key].needs
    }


def statistics_for(a: Algorithm, path: str, observed: Mapping[str, float]) -> Mapping[str, float]:
    """Return what the plugin at a path observes: below a KL with a reference of its own, `kl/rollout/*` are of that one."""
    axis, _, place = path.partition(".")
    title = a.titled("kl")[int(place.partition(".")[0])][0] if axis == "kl" else ""
    if title not in drifts(a):
        return observed
    rest = {name: x for name, x in observed.items() if not name.startswith("kl/rollout/")}
    own = {name: observed.get(f"kl/{title}/rollout/{name}") for name in ("sequence", "token")}
    return rest | {f"kl/rollout/{name}": x for name, x in own.items() if x is not None}


def on_one_reference(kls: Sequence[KLPlacement]) -> list[KLPlacement]:
    """Return KLs that are all taken on every row and measured against the recipe's reference, for a world that has only one."""
    found = [copy(kl) for kl in kls]
    for kl in found:
        kl.reference = kl.when = None
    return found


def reference_problems(a: Algorithm) -> Iterator[str]:
    """Yield reasons why the references of KLs cannot serve, with the fix."""
    for i, kl in enumerate(a.kl):
        reference, path = kl.reference or a.reference, f"kl.{i}.reference" if kl.reference else "reference"
        if kl.reference is not None and "ref_logps" not in kl.reference.provides:
            yield (
                f"{path}={reference.name} provides nothing to measure kl.{i}={kl.name} against: set {path}.use=frozen, or leave "
                "it out"
            )
            continue
        wanted = "logps"
        if "full_distribution" in kl.estimator.needs:
            wanted = "distributions" if top_k_of(kl) is None else "top_logps"
        if "ref_logps" in reference.provides and wanted not in reference.scores:
            yield (
                f"kl.{i}.estimator={kl.estimator.name} reads {wanted} of the reference, and {path}={reference.name} gives "
                f"{', '.join(sorted(reference.scores)) or 'none'}: choose another estimator, or another reference"
            )
        if kl.when is not None and not kl.when:
            yield (
                f"kl.{i}={kl.name}: when is empty; write a column and its value, for instance kl.{i}.when={{task: math}}, or "
                "leave it out"
            )
    labels: list[Any] = [kl.label for kl in a.kl if kl.label is not None]
    for label in sorted({x for x in labels if labels.count(x) > 1}):
        yield f"{labels.count(label)} KLs are called {label!r} in the logs: give each a `label` of its own"
    for label in labels:
        if label in ("ref", "rollout") or not label.replace("_", "").replace("-", "").replace(".", "").isalnum():
            yield (
                f"a KL's label must be of letters, digits, '_', '-' and '.', and not 'ref' or 'rollout', which are metrics, got "
                f"{label!r}. Choose another"
            )
