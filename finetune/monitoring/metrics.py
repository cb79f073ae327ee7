"""The numbers of a run go to JSON lines, TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.monitoring.appended import AppendedLines, is_full
from finetune.safety import parse_json, shown

logger = logging.getLogger(__name__)

Kind = Literal["train", "eval"]
KINDS: tuple[Kind, ...] = ("train", "eval")
TENSORBOARD_FLUSH_SEC = 10
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


class MetricsLogger:
    """Writes every metric of a run to all of its outputs.

    In `run_dir`: `metrics.train.jsonl` and `metrics.eval.jsonl` (one object a line, complete
    after every `log`, or when a full disk has room again), `tb/`, and with `wandb_args.project`
    the folder `wandb/`.

    With `resumed_step` the run goes on after that step: what was logged later is cut off, because
    those steps will run again, and the wandb run of before is continued.

    With `enabled=False` (every rank but the first) nothing is opened and nothing is written.

    Raises `UserError` if a file cannot be written or wandb cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb_args: WandbSettings,
        config: dict[str, Any],
        enabled: bool = True,
        resumed_step: int | None = None,
    ) -> None:
        self._enabled = enabled
        self.exit_status = 0
        """What the run ends with, if it ends by no error: wandb shows it."""
        self._outputs = ExitStack()
        if not enabled:
            return
        self._wandb: Any = None
        with ExitStack() as opened:  # closes what is open already if a later output fails
            # Ended last: a line that cannot be written at the end is an error of the run too.
            opened.push(self._finish_wandb)
            with _writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
            self._files = {
                kind: opened.enter_context(_open_jsonl(metrics_path(run_dir, kind), resumed_step))
                for kind in KINDS
            }
            self._tensorboard = _TensorBoard(run_dir / "tb", resumed_step)
            opened.callback(self._tensorboard.close)
            if wandb_args.project:
                self._wandb = open_wandb(run_dir, wandb_args, config, resumed_step is not None)
            self._outputs = opened.pop_all()

    def log(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one optimizer step; `time` (UTC) is added to the JSON line."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"step": step, "time": now} | {name: _to_json(v) for name, v in values.items()}
        file = self._files[kind]
        with _writing(file.path):
            file.append(json.dumps(line, allow_nan=False))

        tagged = {f"{kind}/{name}": value for name, value in values.items()}
        self._tensorboard.log(tagged, step, has_room=not file.is_waiting)
        if self._wandb is not None:
            self._wandb.log({"step": step, **tagged})

    def close(self) -> None:
        """Finish all outputs; a second call does nothing."""
        self._outputs.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._outputs.__exit__(exc_type, exc, traceback)

    def _finish_wandb(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=self.exit_status if exc_type is None else 1)


def metrics_path(run_dir: Path, kind: Kind) -> Path:
    return run_dir / f"metrics.{kind}.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a metrics file, in order, numbers as floats (NaN and infinity
    too).

    A last line without its newline, which a killed run leaves behind, is not complete.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            numbers = {name: float(v) for name, v in record.items() if name not in ("step", "time")}
            records.append({"step": int(record["step"]), "time": record["time"]} | numbers)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: not a line of metrics ({error!r}). Nothing but the "
                "training run writes this file: remove the line or restore the file."
            ) from error
    return records


def _to_json(value: float) -> float | str:
    # JSON has no NaN and no infinity. As a string the value stays visible, and both
    # Python's float() and JavaScript's Number() turn it back into what it was.
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a message that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or fix the "
            "permissions, or choose another run_dir."
        ) from error


@contextmanager
def _open_jsonl(path: Path, resumed_step: int | None) -> Iterator[AppendedLines]:
    with _writing(path):
        if resumed_step is not None and path.exists():
            _cut_after(path, resumed_step)
        file = AppendedLines(path, is_new=resumed_step is None)
    # Not around the whole run: an error that passes through here may have nothing to do with it,
    # and is what the run has ended by.
    try:
        yield file
    except BaseException:
        try:
            file.close()
        except OSError as error:
            logger.error("%s cannot be written: %s.", path, error.strerror)
        raise
    with _writing(path):
        file.close()


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and an incomplete last line."""
    keep = [record["step"] <= step for record in read_metrics(path)]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    write_whole(path, "".join(line for line, kept in zip(lines, keep, strict=False) if kept))


class _TensorBoard:
    """TensorBoard's files; after a full disk they go on in a new one."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        self._folder = folder
        self._writer: Any = _open_tensorboard(folder, resumed_step)

    def log(self, values: Mapping[str, float], step: int, *, has_room: bool) -> None:
        """
        Args:
            has_room: whether the disk took other files of the same step; what has ended is begun
                anew only then, as each try leaves a file.

        Raises:
            UserError: it cannot be written, for another reason than a full disk.
        """
        if self._writer is None and not has_room:
            return
        with _writing(self._folder), self._missing_if_full():
            if self._writer is None:
                self._writer = _new_writer(self._folder, step)
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._writer is not None:
            with _writing(self._folder), self._missing_if_full():
                self._writer.close()

    @contextmanager
    def _missing_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            logger.warning(
                "%s: %s. Some of it is missing until there is room; training goes on.",
                self._folder,
                error.strerror,
            )
            # Its thread has ended, with what was in its queue.
            self._writer = None


@cache
def _let_writers_end_without_traceback() -> None:
    """Have the threads of TensorBoard's writers, which hand their errors to the next call, say
    nothing themselves; in this process, from now on."""
    others = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(args.exc_value, OSError)):
            others(args)

    threading.excepthook = hook


def _open_tensorboard(folder: Path, resumed_step: int | None) -> Any:
    first_step = 0 if resumed_step is None else resumed_step + 1
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"run_dir: {shown(str(folder.parent))} has letters that this locale does not know, and "
            "TensorBoard needs them. Set PYTHONUTF8=1, or give the folder a plain name."
        ) from None
    with _writing(folder):
        return _new_writer(folder, first_step)


def _new_writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    _let_writers_end_without_traceback()
    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=TENSORBOARD_FLUSH_SEC)


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


def open_wandb(run_dir: Path, args: WandbSettings, config: dict[str, Any], resumed: bool) -> Any:
    """Start the wandb run, or continue the one named in `run_dir/wandb_run_id`."""
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
