"""Architectures of transformers 5.23 from which `model.generate` samples only without padding, or not at all.

The trial of a loaded model decides; this is what it found on small random models, for plans that are made before a model loads.
"""

from __future__ import annotations

EQUAL_LENGTHS = frozenset(
    {
        *(
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "deepseek_v4",
            "marian",
            "mbart",
            "minimax",
            "mvp",
        ),
        *("pegasus", "plbart", "recurrent_gemma", "trocr"),
    }
)
"""Types whose recurrent state or positions take in padding on the left."""
WITHOUT_CACHE = frozenset({"rwkv", "xlstm"})
"""Types that decode another model with their cache, and take in padding without it."""
REFUSED = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm", "xlm-roberta", "xlm-roberta-xl"}
)
"""Types that decode another model: their positions differ from those of a plain forward."""
