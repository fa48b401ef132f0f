"""Find an account of Weights & Biases."""

from __future__ import annotations

from typing import Any


def has_account(settings: Any) -> bool:
    """Return whether W&B's settings, the environment or the netrc file hold a key, without network access."""
    from requests.utils import get_netrc_auth

    own = settings.api_key or getattr(settings, "identity_token_file", None)
    return bool(own or get_netrc_auth(settings.base_url))
