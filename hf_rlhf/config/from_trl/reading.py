"""Read a config of TRL: values by field, TRL's defaults, and why a field has no counterpart."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_rlhf.config.mappings import rows
from hf_rlhf.config.training_arguments import NOT_IN_RECIPE, OFFLINE_REFUSED, REFUSED, WITHOUT_EFFECT
from hf_rlhf.runtime.errors import UserError, did_you_mean

SCRIPTS: dict[str, Any] = {
    "reward_funcs": None,
    "reward_model_name_or_path": None,
    "datasets": [],
    "streaming": False,
    "test_split_size": None,
    "env": {},
}
"""Fields of the command line of `trl grpo` that are in none of the classes that are read, with their defaults."""
MIXTURE = "dataset.path names one dataset: write the mixture to a file, or to a folder by datasets.save_to_disk"
REASONS = {
    "datasets": MIXTURE,
    "streaming": MIXTURE,
    "test_split_size": "dataset.held_out is the number of rows to hold out",
    "env": "set environment variables in the shell",
    "output_dir": "pass --output-dir",
    "run_name": "pass it in the environment (WANDB_NAME)",
    "hub_token": "set HF_TOKEN, or use `hf auth login`",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR",
    "resume_from_checkpoint": "pass --resume",
    "ignore_bias_buffers": "it is for torch's DDP with buffers of other types, and is not needed",
    "lora_task_type": "policies are causal language models",
    "bnb_4bit_quant_storage": "it is for FSDP, which is rejected",
    "use_peft": "",
}
"""Reasons that no table of the guide says: field -> why it has no counterpart."""
LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
"""Values of `loss_type` of GRPO's trainer."""
GIVEN_AS = {
    "True": True,
    "yes": True,
    "on": True,
    "False": False,
    "no": False,
    "off": False,
    "true": True,
    "false": False,
}


def read_config(path: Path) -> dict[str, Any]:
    """Return a YAML or JSON file as TRL's command line reads it. Raises `UserError` for one that is not a mapping."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be YAML or JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path} must be a mapping from fields of a config of TRL to values, got {type(found).__name__}"
        )
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in found.items()}


def fields_of(trainer: str) -> dict[str, Any]:
    """Return the fields of the classes that `trl grpo`, `trl rloo` or `trl dpo` reads, with their defaults."""
    import trl

    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "dpo": trl.DPOConfig}[trainer]
    found: dict[str, Any] = {}
    for cls in (config, trl.ModelConfig, trl.ScriptArguments):
        for field in dataclasses.fields(cls):
            if field.init:
                factory = field.default_factory
                found[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return found | {name: x for name, x in SCRIPTS.items() if trainer != "dpo" or not name.startswith("reward")}


def made_by_default(trainer: str) -> dict[str, Any]:
    """Return the fields of a config that was made with defaults alone, as TRL writes it."""
    import trl

    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "dpo": trl.DPOConfig}[trainer]
    made: dict[str, Any] = json.loads(config("unused", use_cpu=True).to_json_string())
    of_run = ("output_dir", "use_cpu", "generation_batch_size", "steps_per_generation")  # the latter tell the processes
    return {name: x for name, x in made.items() if name not in of_run}


def trainer_of(given: Mapping[str, Any]) -> str:
    """Return the one trainer whose config has all fields. Raises `UserError` for an unknown field, and where several have."""
    known = {trainer: fields_of(trainer) for trainer in ("grpo", "rloo", "dpo")}
    lacking = {trainer: [name for name in given if name not in fields] for trainer, fields in known.items()}
    fitting = [trainer for trainer, names in lacking.items() if not names]
    if "loss_type" in given and len(fitting) > 1:
        of_rollouts = isinstance(given["loss_type"], str) and given["loss_type"] in LOSSES
        fitting = [trainer for trainer in fitting if (trainer != "dpo") == of_rollouts]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"the config may be one of {', '.join(fitting)}. Pass --trainer {fitting[0]}, for instance")
    check_fields(given, min(lacking, key=lambda trainer: len(lacking[trainer])))
    raise AssertionError


def check_fields(given: Mapping[str, Any], trainer: str) -> None:
    """Raise `UserError` for a field that the trainer's config does not have."""
    fields = fields_of(trainer)
    if unknown := [name for name in given if name not in fields]:
        near = did_you_mean(unknown[0], fields)
        raise UserError(
            f"TRL's {trainer} has no field {unknown[0]!r}.{near} Configs of its trainers grpo, rloo and dpo are read"
        )


class Reader:
    """The values of a config that differ from TRL's defaults. Those that are not asked for are listed by `left`.

    A config that TRL has written itself holds every field, with what its `__post_init__` has made of the defaults.
    """

    def __init__(self, given: Mapping[str, Any], trainer: str):
        check_fields(given, trainer)
        self.trainer, self.defaults = trainer, fields_of(trainer)
        typed = {name: self._typed(name, value) for name, value in given.items()}
        made = made_by_default(trainer) if {"output_dir", "lr_scheduler_type"} <= given.keys() else {}
        self.given = {
            name: value
            for name, value in typed.items()
            if value != self.defaults[name] and (name not in made or value != made[name])
        }
        self.asked: set[str] = set()
        self.notes: list[tuple[str, str]] = []

    def __call__(self, name: str) -> Any:
        """Return the value of a field, or TRL's default, and take note that it has a counterpart."""
        self.asked.add(name)
        return self.given.get(name, self.defaults[name])

    def note(self, name: str, why: str) -> None:
        """List a field whose value has no exact counterpart."""
        self.asked.add(name)
        self.notes.append((name, why))

    def left(self) -> list[tuple[str, str]]:
        """Return (field, reason) of what was not asked for and differs from TRL's default."""
        return [(name, self.reason(name)) for name in self.given if name not in self.asked]

    def reason(self, name: str) -> str:
        """Return why a field has no counterpart, as the guide says it. Raises `LookupError` for a field without a word."""
        refused = OFFLINE_REFUSED if self.trainer == "dpo" else {**REFUSED, **WITHOUT_EFFECT}
        if name in REASONS:
            return REASONS[name]
        if name in refused:
            return refused[name]
        if name in NOT_IN_RECIPE:
            return "it is no part of a recipe"
        titles = [f"TRL's {title}" for title in (_TITLES[self.trainer], "GRPOConfig", "arguments")]
        for title in titles:
            for row in rows():
                if row.source == title and name in row.names:
                    return row.text.partition(" -> ")[2]
        raise LookupError(name)

    def _typed(self, name: str, value: Any) -> Any:
        """Return a value as TRL's command line types it: YAML 1.1 reads 1e-6 as text, and arguments may be JSON."""
        if not isinstance(value, str):
            return value
        default = self.defaults[name]
        if isinstance(default, bool) and value in GIVEN_AS:
            return GIVEN_AS[value]
        if value.lstrip().startswith(("{", "[")):
            try:
                return json.loads(value)
            except ValueError:
                return value
        number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value)
        return float(value) if number and not name.endswith(("_path", "_name", "revision", "split")) else value


_TITLES = {"grpo": "GRPOConfig", "rloo": "RLOOConfig", "dpo": "DPOConfig"}
