"""Whether there is a Weights & Biases account to work with."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

_HOST = "https://api.wandb.ai"


def why_no_account() -> str | None:
    """Why nothing can be sent to Weights & Biases, in a few words; None when there is an account.

    Looks at WANDB_MODE and at where `wandb login` and its documentation put a key: WANDB_API_KEY, or the netrc file's
    entry of the host of WANDB_BASE_URL. No key is read out, and nothing is sent.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return f"WANDB_MODE is {mode}"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    if os.environ.get("WANDB_API_KEY") or _in_netrc(host):
        return None
    return f"no account: neither WANDB_API_KEY nor a netrc entry of {host}"


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
