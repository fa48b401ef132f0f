"""A fingerprint changes with what is read, and with nothing else."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Prompt
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data import fingerprints
from hf_rlhf.data.fingerprints import contents_of, rows_hash
from hf_rlhf.data.prompt_stream import PromptStream


@dataclass(kw_only=True)
class Reads(RewardSource):
    """A reward with settings of every kind."""

    name = "reads"

    source: Any = None
    cache: str | None = field(default=None, metadata={"written": True})

    def __call__(self, rollouts: Any) -> list[float]:
        return [0.0] * len(rollouts)


def of(source: Any, **settings: Any) -> dict[str, str]:
    """Name -> hash of what a reward with this setting reads, its own class left out."""
    found = contents_of([("rewards.0", Reads(source=source, **settings))], Model())
    return {name: entry["hash"] for name, entry in found.items() if name != "rewards.0"}


def save_adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (folder / "adapter_model.safetensors").write_bytes(b"a" * 99)
    return folder


def save_weights(folder: Path, size: int = 100) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{} " * 3 + bytes(size))
    return folder


def test_rows_count_in_their_order_and_columns_in_any():
    rows = [{"a": 1, "b": [2.0, None]}, {"a": "é", "b": []}]
    assert rows_hash(rows) == rows_hash([dict(reversed(row.items())) for row in rows])
    others = [
        rows[::-1],
        rows[:1],
        [*rows, rows[0]],
        [rows[0], {**rows[1], "b": [0]}],
        [{**rows[0], "a": True}, rows[1]],
    ]
    assert len({rows_hash(x) for x in [rows, *others]}) == 6


def test_rows_may_hold_what_json_does_not():
    odd = [{"x": b"\x00"}, {"x": np.arange(2)}, {"x": date(2020, 1, 1)}, {"x": "\ud800"}, {"x": {1, 2}}, {1: 2, "a": 3}]
    assert rows_hash(odd) == rows_hash(list(odd))
    assert rows_hash([{"x": b"\x00"}]) != rows_hash([{"x": b"\x01"}])


def test_a_file_counts_by_its_content_and_not_by_its_name_or_time(tmp_path):
    for name, text in (("a.py", "x = 1"), ("b.py", "x = 1"), ("c.py", "x = 2")):
        (tmp_path / name).write_text(text)
    os.utime(tmp_path / "b.py", (1, 1))
    a, b, c = (of(str(tmp_path / f"{name}.py:score")) for name in "abc")
    assert a == b != c
    assert list(a) == ["rewards.0.source"]
    assert of([str(tmp_path / "a.py")]).keys() == {"rewards.0.source.0"}
    assert of({"k": str(tmp_path / "a.py")}).keys() == {"rewards.0.source.k"}


def test_a_models_folder_counts_by_the_files_that_loading_reads(tmp_path):
    model = save_weights(tmp_path / "model")
    before = of(str(model))
    (model / "README.md").write_text("words")
    (model / "checkpoint-1").mkdir()
    assert of(str(model)) == before != {}
    for name in ("model.safetensors", "config.json"):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept[:-1] + b"\x01")
        assert of(str(model)) != before, name
        (model / name).write_bytes(kept)
    (model / "tokenizer.json").write_text("{}")
    assert of(str(model)) != before


def test_an_adapters_base_counts_too(tmp_path):
    base = save_weights(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    before = of(str(adapter))
    assert before.keys() == {"rewards.0.source", "rewards.0.source.base"}
    (base / "config.json").write_text('{"a": 1}')
    now = of(str(adapter))
    assert now["rewards.0.source"] == before["rewards.0.source"]
    assert now["rewards.0.source.base"] != before["rewards.0.source.base"]


def test_of_large_weights_the_size_the_header_and_a_sample_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE", 1000)
    model = save_weights(tmp_path / "model", size=9_000_000)
    file = model / "model.safetensors"
    before, content = of(str(model)), bytearray(file.read_bytes())
    for place in (9, 20, len(content) // 3 + 40_000, -1):
        changed = bytearray(content)
        first = range(len(changed))[place]
        changed[first : first + 600_000] = b"\x07" * len(changed[first : first + 600_000])
        file.write_bytes(changed)
        assert of(str(model)) != before, place
    file.write_bytes(content + b"\x00")
    assert of(str(model)) != before


def test_a_model_on_the_hub_counts_by_its_commit(tmp_path, monkeypatch):
    def cached(repo: str, file: str, revision: str | None = None) -> str | None:
        return f"/cache/models--{repo}/snapshots/{commit}/{file}" if repo == "org/model" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    commit = "abc"
    assert of("org/model") == {"rewards.0.source": "abc"}
    assert of("org/other") == of("no model") == of("a" * 300) == of("policy") == {}


def test_a_function_counts_by_its_text_and_bound_arguments():
    def one(x: Any) -> float:
        return 1.0

    def two(x: Any) -> float:
        return 2.0

    bound = [functools.partial(one, y=1), functools.partial(one, y=2)]
    assert len({str(of(x)) for x in [one, two, *bound]}) == 4
    assert of("json:dumps").keys() == {"rewards.0.source"}


def test_a_plugin_of_another_package_or_a_file_counts_by_its_file_and_the_packages_own_does_not():
    from hf_rlhf import load_plugin

    found = contents_of([("rewards.0", Reads()), ("rewards.1", load_plugin("rewards", "length"))], Model())
    assert found.keys() == {"rewards.0"}
    assert found["rewards.0"]["of"] == "Reads"


@pytest.mark.parametrize(
    "text", ["", "a\x00b", "x" * 5000, "answer", "https://host:8000/v1", ".*[a-f].*", ".", "/", "~", "a/b"]
)
def test_texts_that_name_nothing_have_no_fingerprint(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answer").mkdir()
    assert of(text) == {}


def test_what_a_plugin_writes_has_none(tmp_path):
    (tmp_path / "cache.db").write_text("x")
    assert of(None, cache=str(tmp_path / "cache.db")) == {}


class Stream:
    """Prompts without a length."""

    def __init__(self, numbers: Any):
        self.numbers = numbers

    def __iter__(self) -> Any:
        return (Prompt(ids=[n], prompt=str(n), columns={}) for n in self.numbers)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_resumes_after_the_prompts_that_it_gave_and_no_others(shuffle):
    def stream(numbers: Any) -> PromptStream:
        return PromptStream(Stream(numbers), seed=3, shuffle=shuffle)

    first = stream(range(50))
    first.next(20)
    state = first.state_dict()
    again = stream(range(50))
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert [p.ids for p in again.next(70)] == [p.ids for p in first.next(70)]
    assert again.state_dict() == first.state_dict()
    for numbers in (range(1, 51), [*range(5), 7, *range(6, 50)], range(10)):
        with pytest.raises(ValueError, match="dataset: the first 20 prompts of the stream are not those"):
            stream(numbers).load_state_dict(state)
        stream(numbers).load_state_dict(state, same=False)
    old = {name: x for name, x in state.items() if name != "consumed"}
    stream(range(1, 51)).load_state_dict(old)
