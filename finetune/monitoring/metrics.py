"""The numbers of a run go to JSON lines, TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.monitoring.appended import AppendedLines, is_full
from finetune.monitoring.kinds import KINDS, Kind
from finetune.monitoring.wandb_run import WandbSettings, open_wandb
from finetune.safety import parse_json, shown

logger = logging.getLogger(__name__)

TENSORBOARD_FLUSH_SEC = 10


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
