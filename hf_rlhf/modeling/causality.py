"""A probe for models whose states depend on later tokens."""

from __future__ import annotations

from typing import Any

import torch

from hf_rlhf.modeling.token_batch import _inner, _probing

TOKENS = 9
"""Length of the rows of the probe."""


def future_seen(model: Any) -> float | None:
    """Return the change of logits when a later token changes, relative to the largest logit; None if it is rounding.

    Two rows differ in their last token. A third row repeats the first, which shows what rounding does.
    """
    words = len(model.get_input_embeddings().weight)
    special = {getattr(_inner(model).config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    plain = [token for token in range(min(words, 4 * TOKENS)) if token not in special]
    if len(plain) < 2:
        return None
    row = [plain[(7 * i + 3) % len(plain)] for i in range(TOKENS)]
    other = [*row[:-1], plain[(plain.index(row[-1]) + 1) % len(plain)]]
    with _probing(model):
        ids = torch.tensor([row, other, row], device=_inner(model).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    first, changed, again = logits.double()
    size = first.abs().max().clamp(min=1e-30)
    seen, rounding = (float((x - first).abs().max() / size) for x in (changed, again))
    bound = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 4e-3
    return seen if seen > max(bound, 10 * rounding) else None
