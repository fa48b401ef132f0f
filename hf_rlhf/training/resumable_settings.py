"""Settings that a resumed run must share with its checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import TextTerm
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.training_arguments import DECISIVE

if TYPE_CHECKING:
    from transformers import TrainingArguments


def resumable_settings(
    args: TrainingArguments, sections: dict[str, Any], peft_config: Any, algorithm: Algorithm
) -> dict[str, Any]:
    """Return the settings besides the algorithm that must not change between a checkpoint and its resumption.

    The size of a micro-batch changes no sum once it holds all rows of a rollout, where these are the only rows.
    """
    chosen = {name: getattr(args, name) for name in DECISIVE}
    own_texts = any(isinstance(term, TextTerm) for term in algorithm.loss_terms)
    most = sys.maxsize if own_texts else algorithm.rollout.prompts * algorithm.rollout.num_generations
    chosen["per_device_train_batch_size"] = min(args.per_device_train_batch_size, most)
    chosen["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    model = {name: x for name, x in asdict(sections["model"]).items() if name != "save_merged"}
    kept = {"training": chosen, "model": model, "dataset": asdict(sections["dataset"])}
    if peft_config is not None:
        kept["peft"] = {
            name: x
            for name, x in peft_config.to_dict().items()
            if name in ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora")
        }
    return json.loads(json.dumps(kept, default=str))
