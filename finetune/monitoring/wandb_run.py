"""A run, or an evaluation, in Weights & Biases."""

import logging
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.monitoring.kinds import KINDS

logger = logging.getLogger(__name__)

WANDB_CONNECT_SEC = 10
WANDB_INIT_SEC = 30


class WandbSettings(Protocol):
    """Fields of the configuration's `wandb` section that `MetricsLogger` reads."""

    @property
    def project(self) -> str | None: ...
    @property
    def offline(self) -> bool: ...
    @property
    def key(self) -> str | None: ...
    @property
    def run_name(self) -> str | None: ...


def require_wandb() -> Any:
    """Return the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb.project is set, but the package wandb is not installed: "
            "pip install 'moshi-ttt[wandb]', or unset wandb.project."
        ) from error
    return wandb


def open_wandb(
    run_dir: Path,
    args: WandbSettings,
    config: dict[str, Any],
    resumed: bool,
    *,
    keeps_id: bool = True,
) -> Any:
    """Start the wandb run, or continue the one named in `run_dir/wandb_run_id`.

    Args:
        keeps_id: it is to be continued, and is named there; an evaluation in a run's folder is not
            that run.
    """
    wandb = require_wandb()
    offline = args.offline or os.environ.get("WANDB_MODE") == "offline"
    id_file = run_dir / "wandb_run_id"
    run_id = id_file.read_text(encoding="utf-8").strip() if resumed and id_file.exists() else None
    try:
        with _without_prompt(), _key_hidden_in_arguments(args.key), _key_in_environment(args.key):
            if not offline:
                _check_reachable(wandb.setup().settings.base_url)
            run = wandb.init(
                project=args.project,
                name=args.run_name or run_dir.resolve().name,
                id=run_id,
                resume="allow" if run_id and not offline else None,
                mode="offline" if offline else None,
                config=_without_key(config),
                dir=str(run_dir),
                # Our own lines say what is needed, and a captured progress bar is only noise.
                settings=wandb.Settings(init_timeout=WANDB_INIT_SEC, silent=True, console="off"),
            )
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if args.key:
            reason = reason.replace(args.key, "***")
        raise UserError(
            f"wandb cannot be reached or refused the run ({reason}). Either set "
            f"--wandb.offline=true and sync later with `wandb sync {run_dir}/wandb/offline-run-*`, "
            "or give a valid wandb.key (or run `wandb login` once), or unset wandb.project."
        ) from error

    if keeps_id:
        write_whole(id_file, run.id + "\n")
    # A step metric of our own: wandb's step refuses to go back, as it must after resuming.
    run.define_metric("step")
    for kind in KINDS:
        run.define_metric(f"{kind}/*", step_metric="step")
    if offline:
        logger.info("wandb is offline; upload later with: wandb sync %s", Path(run.dir).parent)
    else:
        logger.info("wandb: %s", run.url)
    return run


def _check_reachable(url: str) -> None:
    """Fail at once without a network; wandb itself would retry until its time is over.

    Behind a proxy only wandb can tell. Raises OSError.
    """
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=WANDB_CONNECT_SEC).close()
    except OSError as error:
        raise OSError(f"no connection to {url}: {error}") from error


def _without_key(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("wandb")
    if not isinstance(section, dict):
        return config
    return config | {"wandb": {name: v for name, v in section.items() if name != "key"}}


@contextmanager
def _without_prompt() -> Iterator[None]:
    """No login question: wandb asks only if there is a terminal to answer from."""
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


@contextmanager
def _key_hidden_in_arguments(key: str | None) -> Iterator[None]:
    """wandb saves the command line with the run, and `--wandb.key=…` may be on it."""
    arguments = sys.argv
    sys.argv = [argument.replace(key, "***") if key else argument for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def _key_in_environment(key: str | None) -> Iterator[None]:
    """Hand over the key for the length of the start; `wandb.login` would write it to ~/.netrc."""
    before = os.environ.get("WANDB_API_KEY")
    if key:
        os.environ["WANDB_API_KEY"] = key
    try:
        yield
    finally:
        if key:
            del os.environ["WANDB_API_KEY"]
            if before is not None:
                os.environ["WANDB_API_KEY"] = before
