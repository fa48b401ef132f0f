"""What the settings of a recipe's sections change, but for rewards and rollouts; see `base`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hf_rlhf import load_plugin
from hf_rlhf.config.sections import Dataset
from hf_rlhf.contract.model_settings import Lora, Model
from hf_rlhf.data.adapters import add_adapter
from hf_rlhf.data.model_loading import load_model, load_tokenizer, lora_config
from hf_rlhf.data.prompts import load_prompts
from hf_rlhf.testing import tiny_policy
from tests.contract.setting_effects.base import EFFECTS, SettingEffect, after
from tests.helpers import runs

EFFECTS["update.mini_batches"] = SettingEffect(1, 2, after(lambda folder, value: {"update": {"mini_batches": value}}))
EFFECTS["update.epochs"] = SettingEffect(1, 2, after(lambda folder, value: {"update": {"epochs": value}}))


def micro_batches(folder: Path, tokens: int | None) -> list[int]:
    """The rows of each micro-batch."""
    made = runs.trainer(folder, update={"max_tokens_per_micro_batch": tokens})
    buffer = made.collector.collect(0)
    return [len(micro["mask"]) for micro in buffer.slot(0, made.algorithm, 0, made.collector.forwards.batching)]


EFFECTS["update.max_tokens_per_micro_batch"] = SettingEffect(None, 20, micro_batches)


def positions(folder: Path, attention: Literal["packed", "padded"]) -> int:
    """Tokens that pass the trunk in one optimizer step, padding included."""
    made = runs.trainer(folder, update={"attention": attention})
    slot = made.collector.collect(0).slot(0, made.algorithm, 0, made.collector.forwards.batching)
    return sum(micro["batch"].positions for micro in slot)


EFFECTS["update.attention"] = SettingEffect("packed", "padded", positions)


def rows_of_the_loss(folder: Path, fused_loss: str) -> set[int]:
    """How many rows the policy loss sees at a time where a gradient is taken: those of a micro-batch, or the one of a tile."""
    seen: set[int] = set()
    plugin = load_plugin("policy_loss", "reinforce")
    own = type(plugin).__call__

    class Seen(type(plugin)):  # type: ignore[misc]
        def __call__(self, logps: Any, *args: Any, **kwargs: Any) -> Any:
            seen.update({len(logps)} if logps.requires_grad else ())
            return own(self, logps, *args, **kwargs)

    runs.trained(folder, policy_loss=Seen(), update={"fused_loss": fused_loss})
    return seen


EFFECTS["update.fused_loss"] = SettingEffect("auto", "off", rows_of_the_loss)


def first_ratio(folder: Path, old_logps: str) -> float:
    """The ratio of the first optimizer step, to the trainer's log-probs or to those of the rows."""
    rollout = {**runs.SCRIPTED, "logps_column": "logps"}
    rows = [{**row, "logps": [[-1.0] * len(ids) for ids in row["masks"]]} for row in runs.problems()]
    made = runs.trainer(
        folder / old_logps, data=rows, rollout=rollout, update={"old_logps": old_logps, "epochs": 1, "mini_batches": 1}
    )
    made.train()
    return float(next(entry["policy/ratio"] for entry in made.state.log_history if "policy/ratio" in entry))


EFFECTS["update.old_logps"] = SettingEffect("trainer", "sampler", first_ratio)


def evaluation(setting: str) -> Callable[[Path, Any], Any]:
    def show(folder: Path, value: Any) -> Any:
        sampled = {"rollout": runs.SAMPLED, "evaluation": {"num_generations": 2, setting: value}}
        made = runs.trainer(folder, eval_data=runs.problems(5, seed=2), **sampled)
        return {name: x for name, x in made.evaluate().items() if "runtime" not in name and "per_second" not in name}

    return show


EFFECTS["evaluation.num_generations"] = SettingEffect(1, 3, evaluation("num_generations"))
EFFECTS["evaluation.temperature"] = SettingEffect(None, 0, evaluation("temperature"))
EFFECTS["evaluation.prompts"] = SettingEffect(None, 2, evaluation("prompts"))


def written(folder: Path, completions: int) -> int:
    """Rows of completions in the files of a run."""
    import pyarrow.parquet as pq

    place = folder / str(completions)
    runs.trained(place, logging={"completions": completions})
    return sum(pq.read_table(file).num_rows for file in place.glob("completions/*.parquet"))


EFFECTS["logging.completions"] = SettingEffect(3, 0, written)


def entropy_logged(folder: Path, kind: str) -> float:
    made = runs.trainer(folder / kind, logging={"entropy": kind})
    made.train()
    return next(entry["policy/entropy"] for entry in made.state.log_history if "policy/entropy" in entry)


EFFECTS["logging.entropy"] = SettingEffect("sampled", "exact", entropy_logged)


def saved(folder: Path, seed: int = 0, **config: Any) -> str:
    model, tokenizer = tiny_policy(seed=seed)
    for name, value in config.items():
        setattr(model.config, name, value)
    place = folder / f"model{seed}"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def model_of(setting: str, show: Callable[[Any], Any], **config: Any) -> Callable[[Path, Any], Any]:
    return lambda folder, value: show(load_model(Model(**{"path": saved(folder, **config), setting: value})))


EFFECTS["model.path"] = SettingEffect(
    0, 1, lambda folder, value: runs.parameters(load_model(Model(path=saved(folder, seed=value))))
)
EFFECTS["model.dtype"] = SettingEffect("float32", "float64", model_of("dtype", lambda m: str(m.dtype)))
EFFECTS["model.attn_implementation"] = SettingEffect(
    "sdpa", "eager", model_of("attn_implementation", lambda m: m.config._attn_implementation)
)
EFFECTS["model.dropout"] = SettingEffect(
    False, True, model_of("dropout", lambda m: m.config.attention_dropout, attention_dropout=0.5)
)


def tokens_of(folder: Path, where: str | None) -> Any:
    other = folder / "tokenizer"
    _, tokenizer = tiny_policy()
    tokenizer.add_tokens(["1+1"])
    tokenizer.save_pretrained(other)
    place = str(other) if where else None
    return load_tokenizer(Model(path=saved(folder), tokenizer=place))("1+1=")["input_ids"]


def chat_of(folder: Path, template: str | None) -> Any:
    tokenizer = load_tokenizer(Model(path=saved(folder), chat_template=template))
    return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def rendered(folder: Path, kwargs: dict[str, Any]) -> Any:
    model = Model(
        path=saved(folder), chat_template="{{ messages[0]['content'] }}{{ word }}", chat_template_kwargs=kwargs
    )
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    return load_prompts(Dataset(held_out=0), load_tokenizer(model), train=rows)[0][0].ids


def trainable(folder: Path, lora: dict[str, Any] | None) -> Any:
    made = runs.trainer(folder, model={"path": saved(folder), "lora": lora})
    return sum(p.requires_grad for p in made.model.parameters())


EFFECTS["model.tokenizer"] = SettingEffect(None, "other", tokens_of)
EFFECTS["model.chat_template"] = SettingEffect(None, "{{ messages[0]['content'] }}!", chat_of)
EFFECTS["model.chat_template_kwargs"] = SettingEffect({}, {"word": "!"}, rendered)
EFFECTS["model.lora"] = SettingEffect(None, {"r": 2}, trainable)


def adapted(setting: str) -> Callable[[Path, Any], Any]:
    """The adapter that peft makes of the settings: its modules, ranks, scales and dropout."""

    def show(folder: Path, value: Any) -> Any:
        from peft import get_peft_model
        from peft.tuners.lora import LoraLayer

        model = get_peft_model(tiny_policy()[0], lora_config(Lora(**{setting: value})))
        return [
            [name, layer.r["default"], layer.scaling["default"], getattr(layer.lora_dropout["default"], "p", 0.0)]
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        ]

    return show


def learned(setting: str) -> Any:
    """The names of the trained parameters of an adapter on one kind of layer."""

    def show(folder: Path, value: Any) -> Any:
        config = lora_config(Lora(**{"target_modules": ["q_proj"], setting: value}))
        return [name for name, p in add_adapter(tiny_policy()[0], config).named_parameters() if p.requires_grad]

    return show


EFFECTS["model.lora.r"] = SettingEffect(16, 4, adapted("r"))
EFFECTS["model.lora.alpha"] = SettingEffect(32, 8, adapted("alpha"))
EFFECTS["model.lora.dropout"] = SettingEffect(0.0, 0.5, adapted("dropout"))
EFFECTS["model.lora.use_rslora"] = SettingEffect(False, True, adapted("use_rslora"))
EFFECTS["model.lora.use_dora"] = SettingEffect(False, True, learned("use_dora"))
EFFECTS["model.lora.target_parameters"] = SettingEffect(None, ["mlp.gate_proj.weight"], learned("target_parameters"))
EFFECTS["model.lora.modules_to_save"] = SettingEffect(None, ["lm_head"], learned("modules_to_save"))
EFFECTS["model.lora.trainable_token_indices"] = SettingEffect(None, [5], learned("trainable_token_indices"))
EFFECTS["model.lora.target_modules"] = SettingEffect("all-linear", ["q_proj"], adapted("target_modules"))


ROWS = [
    {"prompt": f"{i}+{i}=", "question": "q" * i, "talk": [{"role": "user", "content": str(i)}]} for i in range(1, 31)
]


def dataset_folder(folder: Path) -> Path:
    """Files, and a folder of them that `datasets` reads with two configurations and two splits."""
    place = folder / "data"
    place.mkdir(exist_ok=True)
    for name, rows in {"a": ROWS, "b": ROWS[:20], "test": ROWS[20:23]}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: one\n  default: true\n  data_files:\n"
        "  - {split: train, path: a.jsonl}\n  - {split: test, path: test.jsonl}\n"
        "- config_name: two\n  data_files:\n  - {split: train, path: b.jsonl}\n---\n"
    )
    return place


def loaded(setting: str, **others: Any) -> Callable[[Path, Any], Any]:
    """The prompts that are read: their tokens, for training and evaluation. `{data}` is the folder."""

    def show(folder: Path, value: Any) -> Any:
        place = dataset_folder(folder)
        settings = {"path": "{data}/a.jsonl", "held_out": 0, **others, setting: value}
        for name, text in settings.items():
            settings[name] = text.replace("{data}", str(place)) if isinstance(text, str) else text
        both = load_prompts(Dataset(**settings), tiny_policy()[1])
        return [type(both[0]).__name__, *[[prompt.ids for prompt in part or []] for part in both]]

    return show


def of_dataset(setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"dataset.{setting}"] = SettingEffect(first, second, loaded(setting, **others))


FOLDER = {"path": "{data}"}
of_dataset("path", "{data}/a.jsonl", "{data}/b.jsonl")
of_dataset("name", "one", "two", **FOLDER)
of_dataset("split", "train", "test", **FOLDER)
of_dataset("eval_path", None, "{data}/test.jsonl")
of_dataset("eval_split", None, "test", **FOLDER)
of_dataset("held_out", 0, 2)
of_dataset("prompt", "prompt", "question")
of_dataset("prompt_template", None, "Say {question}:")
of_dataset("chat", False, True)
of_dataset("system", None, "Be brief.", chat=True)
of_dataset("max_prompt_tokens", None, 4, overlong_prompts="drop")
of_dataset("streaming", False, True)


def order(folder: Path, shuffle: bool) -> Any:
    made = runs.trainer(folder, dataset={"shuffle": shuffle})
    return [prompt.ids for prompt in made.stream.next(6)]


def overlong(folder: Path, choice: str) -> Any:
    try:
        return loaded("overlong_prompts", max_prompt_tokens=4)(folder, choice)
    except ValueError as error:
        return str(error)


EFFECTS["dataset.overlong_prompts"] = SettingEffect("error", "drop", overlong)
EFFECTS["dataset.shuffle"] = SettingEffect(True, False, order)
