"""`chat`: transformers' chat with the model of a run."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import examples
from hf_rlhf.runtime.errors import UserError

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings of a recipe's rollout that GenerationConfig has too."""


@app.command(
    short_help="Chat with a trained model.",
    epilog=examples(
        "hf-rlhf chat outputs/grpo",
        "hf-rlhf chat outputs/grpo/checkpoint-50 temperature=0.2 max_new_tokens=400",
        "hf-rlhf chat outputs/grpo do_sample=false    # always the most likely token",
        "hf-rlhf chat Qwen/Qwen3-0.6B --system-prompt 'Answer in one sentence.'",
    ),
)
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Folder of a run, a checkpoint or a model, or a Hub name.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Fields of GenerationConfig such as temperature=0.2; the recipe's sampling by default.",
        ),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option("--system-prompt", help="System message; the recipe's dataset.system by default.")
    ] = None,
    save_folder: Annotated[str, typer.Option("--save-folder", help="Folder for what !save writes.")] = "chat_history",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", "--trust_remote_code", help="Run code that comes with a model.")
    ] = False,
    plugin: PluginOptions = None,
) -> None:
    """Chat with a model in transformers' own chat, on this machine: no server is started elsewhere, nothing is sent.

    An adapter is merged into its base. Messages are rendered as in training; a model without a chat template continues the last
    message as it was typed. !help lists the commands, !exit, Ctrl-C or Ctrl-D leaves.
    """
    words = list(words or ())
    if wrong := [word for word in words if "=" not in word]:
        raise UserError(f"generation settings must be KEY=VALUE, such as temperature=0.2, got {wrong[0]!r}")
    _check_settings([word.partition("=")[0] for word in words])
    print(f"loading {model}", file=sys.stderr)
    answering, label, defaults, system = _loaded(model, trust_remote_code)
    if not answering.tokenizer.chat_template:
        print("it has no chat template: the last message is continued as it was typed", file=sys.stderr)
    typed = {word.partition("=")[0] for word in words}
    words = [f"{name}={value}" for name, value in defaults.items() if name not in typed] + words
    _run(answering, label, words, system if system_prompt is None else system_prompt, save_folder)


def _check_settings(names: list[str]) -> None:
    from transformers import GenerationConfig

    from hf_rlhf.runtime.errors import did_you_mean

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in names:
        if name not in known:
            raise UserError(f"GenerationConfig has no field {name!r}.{did_you_mean(name, known)}")


def _loaded(word: str, trust_remote_code: bool) -> tuple[Any, str, dict[str, str], str | None]:
    """Return the model, its label, the sampling of its run's recipe as typed, and its system message."""
    from dataclasses import replace

    import torch

    from hf_rlhf.cli.chat_server import Answering
    from hf_rlhf.config.recipe import resolve
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.data.model_loading import load_model, load_tokenizer
    from hf_rlhf.training.model_evaluation import check_writes, find_subjects, model_settings

    (subject,) = find_subjects([word])
    recipe = None if subject.recipe is None else resolve(subject.recipe, name=subject.label)
    settings = model_settings(Model() if recipe is None else recipe.model, subject)
    check_writes(subject, settings, trust_remote_code)
    tokenizer = load_tokenizer(settings, trust_remote_code)
    dtype = "auto" if recipe is None else settings.dtype
    model: Any = load_model(replace(settings, dtype=dtype), trust_remote_code, lora=True).eval()
    if torch.accelerator.is_available() and not getattr(model, "is_quantized", False):
        model = model.to(torch.accelerator.current_accelerator())
    rollout = None if recipe is None else recipe.plugins.get("rollout")
    if rollout is None:
        return Answering(model, tokenizer), subject.label, {}, None
    found = {name: getattr(rollout, name) for name in SAMPLING if getattr(rollout, name, None) is not None}
    if found.get("temperature") == 0:
        found = {**found, "do_sample": False}
        del found["temperature"]
    found = {name: x for name, x in found.items() if not (name == "min_p" and x == 0)}
    typed = {name: f"{x:f}".rstrip("0").rstrip(".") if isinstance(x, float) else str(x) for name, x in found.items()}
    answering = Answering(model, tokenizer, rollout.skip_special_tokens)
    return answering, subject.label, typed, None if recipe is None else recipe.dataset.system


def _run(answering: Any, label: str, flags: list[str], system: str | None, save_folder: str) -> None:
    """Run transformers' chat against the model in this process."""
    from huggingface_hub import constants
    from transformers.cli.chat import Chat

    from hf_rlhf.cli.chat_server import serving

    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False  # what is asked is this process
    try:
        with serving(answering) as url:
            Chat(label, url, generate_flags=flags, system_prompt=system, save_folder=save_folder)
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        constants.HF_HUB_OFFLINE = offline
