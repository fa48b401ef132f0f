"""Find an account of Weights & Biases."""

from __future__ import annotations

import netrc
import os
from typing import Any
from urllib.parse import urlsplit


def has_account(settings: Any) -> bool:
    """Return whether W&B's settings, the environment or the netrc file hold a key, without network access."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    path = os.environ.get("NETRC")
    places = [path] if path else [os.path.expanduser(name) for name in ("~/.netrc", "~/_netrc")]
    for place in places:
        try:
            if netrc.netrc(place).authenticators(urlsplit(settings.base_url).netloc):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
