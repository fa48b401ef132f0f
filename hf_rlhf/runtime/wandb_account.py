"""Find an account of Weights & Biases, whether its server answers, and end a run if it does not."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any


def has_account(settings: Any) -> bool:
    """Return whether W&B's settings, the environment or the netrc file hold a key, without network access."""
    from requests.utils import get_netrc_auth

    own = settings.api_key or getattr(settings, "identity_token_file", None)
    return bool(own or get_netrc_auth(settings.base_url))


def server_problem(settings: Any, seconds: float) -> str | None:
    """Return why W&B's server gives no answer within `seconds`, None if it does; an error is an answer as well.

    W&B's own calls try a server that accepts connections and stays silent again, at the start of a run and at its end.
    """
    import requests

    problem: str | None = f"{settings.base_url} did not answer within {seconds:g} s"
    chosen: dict[str, Any] = {"verify": not getattr(settings, "insecure_disable_ssl", False)}
    proxies = {kind: getattr(settings, f"{kind}_proxy", None) for kind in ("http", "https")}
    chosen["proxies"] = {kind: proxy for kind, proxy in proxies.items() if proxy}

    def ask() -> None:
        nonlocal problem
        try:
            query = {"query": "{__typename}"}
            requests.post(f"{settings.base_url}/graphql", json=query, timeout=seconds, stream=True, **chosen).close()
            problem = None
        except requests.exceptions.SSLError:  # it answers, and W&B may know other certificates
            problem = None
        except requests.Timeout:
            pass
        except requests.RequestException as error:
            problem = f"{settings.base_url} cannot be reached ({type(error).__name__})"

    # `timeout` bounds each read, and not the lookup of the name
    thread = threading.Thread(target=ask, name="hf_rlhf-wandb", daemon=True)
    thread.start()
    thread.join(seconds)
    return problem


def abandon(run: Any) -> None:
    """End a run whose server is silent: W&B would wait for it without a limit. `wandb sync` uploads what is written.

    This ends W&B's process and with it every run of this process.
    """
    import psutil
    import wandb

    run.status()  # answered by W&B's process once it has read all that was logged
    time.sleep(1)  # it writes in the background
    for child in psutil.Process().children():
        if "wandb-core" in child.name():
            child.kill()
    with suppress(Exception):
        wandb.finish()
    wandb.run = None
    with suppress(Exception, SystemExit):  # also drops what it would do at exit
        wandb.teardown()
