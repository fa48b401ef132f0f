"""Push a run to the Hub: its repository is opened before the run, and a push that fails costs nothing of it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.hub import within

logger = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS = 10.0
"""Longest wait for the repository, and for a part of an upload that nobody reads."""
ANSWER_S = 60.0
"""Longest wait for the answer to an upload."""


class PushError(UserError):
    """The Hub did not take a run, which is complete in its folder."""

    code = 1


class Unreachable(Exception):
    """The Hub did not answer."""


def open_repository(
    args: Any, token: str | None = None, private: bool | None = None, silent: bool = True
) -> str | None:
    """Create the repository of a run unless it exists, and return its name.

    Where the Hub does not answer, return None and log it, or raise `Unreachable` unless `silent`. Raises `UserError` without a
    token, and where it may not be written. The answer is kept with `args`.
    """
    if (known := getattr(args, "_hub_repository", None)) is not None:
        return str(known)
    if silent and hasattr(args, "_hub_is_silent"):
        return None
    from huggingface_hub import HfApi

    bound_requests()
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    asked = HfApi(token=token or args.hub_token)
    private = args.hub_private_repo if private is None else private
    try:
        made = answered(lambda: within(SECONDS, lambda: asked.create_repo(name, private=private, exist_ok=True)), name)
    except Unreachable as error:
        if not silent:
            raise
        args._hub_is_silent = True
        logger.warning("push_to_hub: %s. The run goes on, and the Hub is asked again at its end", error)
        return None
    args._hub_repository = made.repo_id
    return str(made.repo_id)


def bound_requests() -> None:
    """Let no request of this process to the Hub wait longer than `ANSWER_S`: by itself the library waits for ever."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import httpx

    get_session().timeout = httpx.Timeout(SECONDS, read=ANSWER_S)


def upload(args: Any, folder: Path, push: Callable[[], T]) -> T:
    """Push a finished run by `push`, and return what it returns. Raises `PushError`, which says how to push it later."""
    name = args.hub_model_id or folder.absolute().name
    try:
        name = open_repository(args, silent=False) or name
        return answered(push, name)
    except Exception as error:  # whatever it is, the run is complete
        later = f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))} . --exclude 'checkpoint-*' --exclude '_*'"
        raise PushError(
            f"{first_line(error).removeprefix('push_to_hub: ')}. The run is complete in {folder}; push it later by `{later}`"
        ) from None


def answered(ask: Callable[[], T], name: str) -> T:
    """Return what the Hub answers. Raises `UserError` for a refusal, and `Unreachable` without an answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    fix = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        return ask()
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(f"push_to_hub needs a token that {constants.ENDPOINT} knows. {fix}") from error
        if status in (403, 404):
            raise UserError(
                f"push_to_hub: the token may not write {name} on {constants.ENDPOINT}. {fix} there, or set "
                "training.hub_model_id to a name of yours"
            ) from error
        if status < 500 and status != 429:
            raise UserError(f"push_to_hub: {constants.ENDPOINT} refused {name}: {first_line(error)}") from error
        raise Unreachable(f"{constants.ENDPOINT} answered {status}") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:  # a TimeoutError is an OSError
        late = isinstance(error, httpx.TimeoutException | TimeoutError)
        why = "did not answer in time" if late else f"could not be reached ({first_line(error)})"
        raise Unreachable(f"{constants.ENDPOINT} {why}") from error


def first_line(error: BaseException) -> str:
    """Return the first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
