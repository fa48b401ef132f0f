"""Names of models and datasets: what is a path is looked up here alone, and the Hub is asked once, for a second."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from functools import partial

import pytest
from huggingface_hub import constants

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import ModelError, load_model, load_tokenizer
from hf_rlhf.data.sources import DatasetError, load_rows
from hf_rlhf.runtime import hub
from tests.helpers.waits import scaled


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub that has the repository `there`, and keeps the paths that it was asked for."""

    def __init__(self, asked, *args):
        self.asked = asked
        super().__init__(*args)

    def do_GET(self):
        self.asked.append(self.path)
        name = self.path.removeprefix("/api/models/").removeprefix("/api/datasets/")
        status, body = {"there": (200, b'{"id": "there", "sha": "1"}'), "busy": (503, b"{}")}.get(name, (404, b"{}"))
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in name else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No repository is cached, the working folder is empty, and no answer is remembered."""
    hub._on_hub.cache_clear()
    monkeypatch.setattr(hub, "_SILENT", [])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    hub._on_hub.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """The requests that a Hub in this process gets."""
    found = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, found))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield found
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def silent():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def refusing():
    """A port that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    "name", ["/none/tinny", "./tinny", "~/tinny", "sub/tinny", "a/b/c", "tinny/", "rows.jsonl", "a:b"]
)
@pytest.mark.parametrize("kind", ["model", "tokenizer", "dataset"])
def test_a_path_is_never_asked_of_the_hub(name, kind, asked, tmp_path):
    (tmp_path / "here" / "sub").mkdir()
    assert name in hub.unavailable(name, kind)
    assert asked == []


@pytest.mark.parametrize("kind", ["model", "tokenizer", "dataset"])
def test_another_name_is_asked_once(kind, asked):
    path = f"/api/{'datasets' if kind == 'dataset' else 'models'}/"
    assert hub.unavailable("there", kind) is None
    for _ in range(2):
        assert "has no" in hub.unavailable("org/absent", kind)
    assert asked == [f"{path}there", f"{path}org/absent"]


def test_a_revision_that_is_not_there_is_named(asked):
    assert "has no revision 'v9'" in hub.unavailable("there", "model", "v9")
    assert hub.unavailable("there", "model") is None


def test_an_error_of_the_hub_is_not_tried_again(asked):
    assert "answered 503" in hub.unavailable("busy", "model")
    assert asked == ["/api/models/busy"]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_cached_is_not_asked_for(kind, asked, tmp_path):
    folder = tmp_path / "cache" / f"{kind}s--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").touch()
    (folder / "refs" / "main").write_text("abc")
    assert hub.unavailable("org/name", kind) is None
    assert hub.unavailable("org/name", kind, "abc") is None
    assert asked == []
    assert "revision 'other'" in hub.unavailable("org/name", kind, "other")
    assert len(asked) == 1


def test_prepared_rows_of_a_dataset_are_cached_too(asked, tmp_path):
    (tmp_path / "home" / "datasets" / "org___rows").mkdir(parents=True)
    assert hub.unavailable("org/rows", "dataset") is None
    assert asked == []


def test_offline_mode_makes_no_request(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in hub.unavailable("there", "model")
    assert asked == []


def test_without_an_answer_the_message_says_both_and_comes_soon(monkeypatch, refusing):
    with silent() as mute:
        for endpoint, seconds, reason in (
            (refusing, 1, "could not be reached"),
            (mute, 3, "did not answer within 1 s"),
        ):
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            monkeypatch.setattr(hub, "_SILENT", [])
            hub._on_hub.cache_clear()
            (path := hub.Path("tiny")).mkdir(exist_ok=True)
            start = time.monotonic()
            said = hub.unavailable("tinny", "model")
            assert time.monotonic() - start < scaled(seconds)
            assert said.startswith(
                f"no model folder tinny. Did you mean '{path}'? tinny is not in the cache either, and"
            )
            assert f"{endpoint} {reason}" in said
            start = time.monotonic()
            assert reason in hub.unavailable("other", "dataset")
            assert time.monotonic() - start < 0.5, "a Hub that is silent is asked again"


def test_loading_says_so_first_and_blames_no_tokenizer(refusing, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"^no (model )?folder tinny\. tinny is not in the cache either"):
            load(Model(path="tinny"))
    with pytest.raises(DatasetError, match=r"^no dataset file or folder rows\. rows is not in the cache either"):
        load_rows("rows")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tinny"}')
    with pytest.raises(ModelError, match="needs its base model: no model folder tinny"):
        load_model(Model(path=str(tmp_path)))


def test_near_names_are_those_of_the_folder_and_of_the_right_kind(tmp_path):
    for name in ("runs/grpo-1/checkpoint-10", "tiny", "problems"):
        hub.Path(name).mkdir(parents=True)
    hub.Path("problems.jsonl").touch()
    hub.Path("tiny.txt").touch()
    hub.Path("runs/grpo-1/checkpoint-10/config.json").touch()
    assert hub.unavailable("./tinyy", "model") == "no model folder ./tinyy. Did you mean 'tiny'?"
    assert "Did you mean 'problems' or 'problems.jsonl'?" in hub.unavailable("./problem.jsonl", "dataset")
    assert "Did you mean 'runs/grpo-1'?" in hub.unavailable("runs/gpro-1", "model")
    assert hub.unavailable("runs/grpo-1", "model").endswith("not a model. Its subfolders checkpoint-10 do")
    assert hub.unavailable("runs/grpo-1/checkpoint-10", "model") is None
