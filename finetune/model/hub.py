"""The Hugging Face hub, asked once: no retries, and no word of its library on the terminal."""

import logging
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

HUB_ERRORS = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError)
TIMEOUT_SEC = 4.0


def is_reachable() -> bool:
    """Return whether the hub answers. If not, its library would try for half a minute."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT_SEC).close()
    except HTTPError:
        return True  # it has answered
    except (OSError, ValueError):
        return False
    return True


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
