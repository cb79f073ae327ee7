"""The Hugging Face hub, asked once: no retries, and no word of its library on the terminal."""

import logging
import threading
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

HUB_ERRORS = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError)
TIMEOUT_SEC = 4.0
"""How long the hub is waited for, all in all."""


def is_reachable() -> bool:
    """Return whether the hub answers. If not, its library would try for half a minute."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE:
        return False
    # A timeout of the socket's counts anew for each address that the name has, and not for asking
    # what these are: a thread of its own can be left behind.
    has_answered = threading.Event()
    asking = threading.Thread(target=_ask, args=(has_answered,), name="hub", daemon=True)
    asking.start()
    asking.join(TIMEOUT_SEC)
    return has_answered.is_set()


def _ask(has_answered: threading.Event) -> None:
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT_SEC).close()
    except HTTPError:
        pass  # an answer
    except (OSError, ValueError, HTTPException):
        return
    has_answered.set()


def shape_from_hub(repo: str) -> Path | None:
    """Return the `config.json` of a repository; None if neither hub nor cache has it."""
    try:
        if is_reachable():
            disable_progress_bars()
            return Path(hf_hub_download(repo, "config.json", etag_timeout=TIMEOUT_SEC))
        cached = try_to_load_from_cache(repo, "config.json")
    except HUB_ERRORS:
        return None
    return Path(cached) if isinstance(cached, str) else None
