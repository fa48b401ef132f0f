"""Look up models, tokenizers and datasets by name before they are loaded: a path here, or a repository on the Hub.

Libraries blame a missing file of a name that is misspelt, after a minute of retries where the Hub cannot be reached.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

from hf_rlhf.runtime.errors import did_you_mean

T = TypeVar("T")
Kind = Literal["model", "tokenizer", "dataset"]
REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]{0,95}(?<![.-])", re.ASCII)
ROW_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
FOUND_IN: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json", "adapter_config.json"),
    "tokenizer": (),
    "dataset": (),
}
"""Files of which a folder of each kind has one."""
SECONDS = 1.0
"""Longest wait for the Hub; HF_HUB_ETAG_TIMEOUT replaces it."""


def is_hub_name(name: object) -> bool:
    """Return whether a name can only be that of a repository on the Hub: it has an owner, and nothing is there by this path."""
    return isinstance(name, str) and "/" in name and REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


@dataclass(frozen=True)
class OnHub:
    """Mark a setting that names a path here or a repository on the Hub."""

    kind: Kind


def unavailable(name: str, kind: Kind, revision: str | None = None) -> str | None:
    """Return why nothing of this kind can be loaded by `name`, or None if it may be there.

    A path, which begins with `/`, `.` or `~` or whose parent folder exists, is looked up here alone. Any other name is that of
    a folder here, or cached, or the Hub is asked once, for at most a second.
    """
    path = Path(name).expanduser()
    if path.exists():
        due = FOUND_IN[kind]
        if not due or (path.is_dir() and any((path / file).is_file() for file in due)):
            return None
        inside = sorted(child.parent.name for file in due for child in path.glob(f"*/{file}"))
        holds = f" Its subfolders {', '.join(inside)} do" if inside else ""
        return f"{name} has no {' or '.join(due)}, so it is not a {kind}.{holds}"
    what = {"model": "model folder", "tokenizer": "folder", "dataset": "dataset file or folder"}[kind]
    here = f"no {what} {name}"
    here += f".{_near(path, kind)}" if path.parent.is_dir() else f": there is no folder {path.parent}."
    local = name.startswith(("/", ".", "~")) or ("/" in name and path.parent.is_dir()) or path.suffix in ROW_FILES
    if local or not REPOSITORY.fullmatch(name):
        return here
    problem = _on_hub(name, "dataset" if kind == "dataset" else "model", revision)
    return problem and f"{here} {problem}"


def _near(path: Path, kind: Kind) -> str:
    """Suggest names of the folder in which `path` would be."""
    inside = [x for x in path.parent.iterdir() if x.is_dir() or (kind == "dataset" and x.suffix in ROW_FILES)]
    return did_you_mean(_title(path), [str(x) for x in sorted(inside) if x.name[0] != "."], lambda x: _title(Path(x)))


def _title(path: Path) -> str:
    return path.stem if path.suffix in ROW_FILES else path.name


@cache
def _on_hub(name: str, kind: str, revision: str | None) -> str | None:
    """Return why the Hub cannot provide a repository that is not cached."""
    from huggingface_hub import constants

    if _is_cached(name, kind, revision):
        return None
    absent = f"{name} is not in the cache either, and"
    if constants.HF_HUB_OFFLINE or (kind == "dataset" and os.environ.get("HF_DATASETS_OFFLINE", "0") not in ("0", "")):
        more = " --repo-type dataset" if kind == "dataset" else ""
        return f"{absent} HF_HUB_OFFLINE forbids to ask the Hub. Download it first: `hf download {name}{more}`"
    if not _SILENT:
        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS)
        try:
            refusal = within(seconds, lambda: _ask(name, kind, revision, seconds))
            return refusal and f"{absent} {refusal}"
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            late = isinstance(error, TimeoutError) or "Timeout" in type(error).__name__
            why = f"did not answer within {seconds:g} s" if late else f"could not be reached ({error})"
            _SILENT.append(f"{constants.ENDPOINT} {why}")
    return f"{absent} {_SILENT[0]}. Give the path of a folder, or try again with HF_HUB_ETAG_TIMEOUT=10"


_SILENT: list[str] = []
"""Reason why the Hub did not answer in this process, if that happened: it is not asked again."""


def _is_cached(name: str, kind: str, revision: str | None) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if commit and any((folder / "snapshots" / commit).glob("*")):
        return True
    rows = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return kind == "dataset" and (rows / name.replace("/", "___")).is_dir()


def _ask(name: str, kind: str, revision: str | None, seconds: float) -> str | None:
    """Make one request. Return None if the repository exists, else why not."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url = f"{constants.ENDPOINT}/api/{kind}s/{name}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
    try:  # HfApi would ask a second question, about its caller
        hf_raise_for_status(get_session().get(url, headers=headers, timeout=seconds))
    except GatedRepoError:
        return None  # it exists; loading it says how to get access
    except RevisionNotFoundError:
        return f"the {kind} on {constants.ENDPOINT} has no revision {revision!r}"
    except RepositoryNotFoundError:
        return f"{constants.ENDPOINT} has no {kind} of this name that you can read (`hf auth login` for a private one)"
    except HfHubHTTPError as error:
        return f"{constants.ENDPOINT} answered {error.response.status_code}. Try again later"
    return None


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise `TimeoutError`: resolving a host name has no time limit of its own."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(seconds + 0.2)
