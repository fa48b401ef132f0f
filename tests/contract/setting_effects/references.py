"""Settings of the references of single KLs, and of the reference that is another model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import ReferenceRows
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.references import References
from hf_rlhf_plugins._http import HttpError
from tests.contract.setting_effects.base import EFFECTS, SettingEffect, after, logged, one_kl
from tests.contract.setting_effects.critics import offloaded
from tests.helpers import runs
from tests.helpers.servers import Raw
from tests.helpers.vllm_teacher import Teacher

COPY = {"use": "sync", "every": 1}


def nested(name: str, setting: str, value: Any) -> dict[str, Any]:
    parts = one_kl(name, setting, value)
    return parts | ({"reference": "none"} if setting == "reference" and value is not None else {})


for kl_name in ("in_advantage", "in_loss", "in_reward", "monitor"):
    for setting, values, show in (
        ("reference", (None, COPY), logged if kl_name == "monitor" else after),
        ("when", (None, {"answer": "none"}), logged if kl_name == "monitor" else after),
        ("label", (None, "anchor"), logged),
    ):
        EFFECTS[f"kl.{kl_name}.{setting}"] = SettingEffect(
            *values, show(lambda folder, value, n=kl_name, s=setting: nested(n, s, value))
        )


# Another model


def saved(folder: Path, seed: int) -> str:
    for part in tiny_policy(seed=seed):
        part.save_pretrained(folder / str(seed))
    return str(folder / str(seed))


def built(folder: Path, seed: int = 1, **settings: Any) -> Any:
    return load_plugin("reference", "model", path=saved(folder, seed), **settings).build(tiny_policy()[0])


def adapted(folder: Path, adapter: str | None) -> Any:
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_policy(seed=1)[0], runs.adapter())
    for p in model.parameters():
        p.data.normal_()
    model.save_pretrained(folder / "adapter")
    return runs.parameters(built(folder, adapter=adapter and str(folder / adapter)))


def revision(folder: Path, value: str | None) -> Any:
    model = tiny_policy()[0]
    with patch("transformers.AutoModelForCausalLM.from_pretrained", return_value=model) as load:
        built(folder, revision=value)
    return load.call_args.kwargs["revision"]


def device(folder: Path, value: str | None) -> str:
    reference = {"use": "model", "path": saved(folder, 1), "device": value}
    made = References.build(
        runs.recipe(kl=["in_loss"], reference=reference).algorithm(), tiny_policy()[0], torch.device("cpu")
    )
    return made.models["reference"][1].device.type


def kept(folder: Path, value: bool) -> Any:
    chosen = {"use": "model", "path": saved(folder, 1), "offload": value}
    return offloaded(lambda _: {"kl": ["in_loss"], "reference": chosen})(folder, value)


EFFECTS |= {
    "reference.model.path": SettingEffect(1, 2, lambda folder, value: runs.parameters(built(folder, value))),
    "reference.model.revision": SettingEffect(None, "main", revision),
    "reference.model.adapter": SettingEffect(None, "adapter", adapted),
    "reference.model.dtype": SettingEffect(
        "policy", "bfloat16", lambda folder, value: str(built(folder, dtype=value).dtype)
    ),
    "reference.model.device": SettingEffect(None, "meta", device),
    "reference.model.offload": SettingEffect(False, True, kept),
}


# Another prompt


def behind(folder: Path, **settings: Any) -> dict[str, Any]:
    """Two optimizer steps of one rollout: the policy has left its copy in the second."""
    chosen = {"use": "with_context", "context": "answer", **settings}
    kl = {"use": "in_loss", "beta": 1.0, "estimator": "exact", "reference": chosen}
    return {"kl": [kl], "update": {"mini_batches": 2}}


for setting, values in {
    "of": ("frozen", "policy"),
    "context": ("answer", "tests.helpers.own_functions:context"),
    "template": ("{prompt}\n\n{context}", "{context} {prompt}"),
}.items():
    EFFECTS[f"reference.with_context.{setting}"] = SettingEffect(
        *values, after(lambda folder, value, s=setting: behind(folder, **{s: value}))
    )
EFFECTS["reference.policy"] = SettingEffect("policy", "frozen", after(lambda folder, value: behind(folder, of=value)))


# A model that a server serves


def served(folder: Path, trouble: Any = lambda route, body, number: None, **settings: Any) -> Any:
    """What a server is asked for two rows and with which key, and their log-probs, or an error."""
    environment = {"NO_PROXY": "127.0.0.1", "FIRST_KEY": "1", "SECOND_KEY": "2"}
    with patch.dict("os.environ", environment), Teacher(*tiny_policy(seed=1), trouble) as server:
        plugin = load_plugin("reference", "remote", **{"url": server.url, **settings})
        rows = ReferenceRows(
            prompt_ids=[[3], [4]], completion_ids=[[5], [6]], mask=torch.ones(2, 1), temperature=1.0, by_model=dict
        )
        try:
            found: Any = plugin.score(rows, frozenset({"logps"}))["logps"].tolist()
        except HttpError as error:
            found = type(error).__name__
        asked = {(x.body["model"], x.headers.get("authorization")) for x in server.requests}
        return asked, found


def of_remote(setting: str, first: Any, second: Any, trouble: Any = None, **others: Any) -> None:
    def outcome(folder: Path, value: Any) -> Any:
        return served(folder, trouble or (lambda route, body, number: None), **{**others, setting: value})

    EFFECTS[f"reference.remote.{setting}"] = SettingEffect(first, second, outcome)


def at_first(answer: Any) -> Any:
    """The first row meets trouble: an answer, or seconds of silence."""

    def trouble(route: str, body: Any, number: int) -> Any:
        if number:
            return None
        return time.sleep(answer) if isinstance(answer, float) else answer

    return trouble


of_remote("model", "teacher", "other")
of_remote("token_env", "FIRST_KEY", "SECOND_KEY")
of_remote("request_timeout", 5.0, 0.2, at_first(0.8), request_retries=0)
of_remote("request_retries", 0, 1, at_first(Raw(status=500)))
of_remote("max_wait", 30.0, 0.1, at_first(Raw(status=429, headers={"Retry-After": "0.3"})))


def rows_at_once(folder: Path, value: int) -> int:
    """The most rows that were asked for at a time."""
    now: list[int] = []
    most = [0]

    def slow(route: str, body: Any, number: int) -> None:
        now.append(number)
        most.append(len(now))
        time.sleep(0.1)
        now.remove(number)

    served(folder, slow, num_workers=value)
    return max(most)


def which(folder: Path, place: int) -> bool:
    """Whether the other one of two servers is asked."""
    with Teacher(*tiny_policy(seed=1)) as other:
        served(folder, **({"url": other.url} if place else {}))
        return bool(other.requests)


EFFECTS["reference.remote.num_workers"] = SettingEffect(1, 2, rows_at_once)
EFFECTS["reference.remote.url"] = SettingEffect(0, 1, which)
