"""The Hugging Face hub, asked once: no retries, and no word of its library on the terminal."""

import logging
import threading
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from finetune.errors import UserError

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


def shape_from_hub(repo: str, key: str) -> tuple[Path | None, str]:
    """Return the `config.json` of a repository; where it cannot be had, why.

    Args:
        key: how the message calls what names the repository.

    Raises:
        UserError: the hub says that there is none of this name, or the name cannot be one.
    """
    try:
        if is_reachable():
            disable_progress_bars()
            return Path(hf_hub_download(repo, "config.json", etag_timeout=TIMEOUT_SEC)), ""
        cached = try_to_load_from_cache(repo, "config.json")
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{key}: {repo!r} is no local folder, and the Hugging Face hub has no repository of "
            f"this name, or none that you may read ({type(error).__name__}). Correct the name; for "
            f"a private one, log in with `hf auth login`. A downloaded copy works as well: name "
            f"its folder."
        ) from error
    except HUB_ERRORS as error:
        # Of what is missing here, and not on the hub, there is an error of the same kind.
        is_there = isinstance(error, EntryNotFoundError)
        if is_there and not isinstance(error, LocalEntryNotFoundError):
            return None, f"{repo} has no config.json"
        cached = None
    return (Path(cached), "") if isinstance(cached, str) else (None, f"{repo} cannot be asked")
