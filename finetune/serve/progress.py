"""Progress of answering recordings: a bar on a terminal, else a line now and then."""

import logging
import time
from types import TracebackType

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from finetune.data import FRAME_RATE_HZ
from finetune.monitoring import console, format_duration

logger = logging.getLogger(__name__)

EVERY_SEC = 15.0


class Progress:
    """Counts frames; the pace is audio of all conversations together by the clock.

    Args:
        num_jobs: how many recordings there are; their lengths become known as they begin.
    """

    def __init__(self, task: str, num_jobs: int) -> None:
        self.task, self.num_jobs = task, num_jobs
        self.num_frames = self.total_frames = self.num_done = 0
        self.started_at = self.told_at = time.monotonic()
        self._bar: RichProgress | None = None
        if console.file.isatty() and console.is_interactive:
            columns = [TextColumn("{task.description}"), BarColumn(bar_width=None)]
            self._bar = RichProgress(*columns, TextColumn("{task.fields[pace]}"), console=console)
            self._line = self._bar.add_task(task, total=None, pace="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            logger.info("%s", self._text())

    def add_work(self, num_frames: int) -> None:
        self.total_frames += num_frames

    def advance(self, num_frames: int, num_done: int) -> None:
        self.num_frames += num_frames
        self.num_done = num_done
        now = time.monotonic()
        if self._bar:
            total = max(self.total_frames, self.num_frames)
            self._bar.update(self._line, completed=self.num_frames, total=total, pace=self._text())
        elif now - self.told_at >= EVERY_SEC:
            self.told_at = now
            logger.info("%s", self._text())

    def _text(self) -> str:
        spent_sec = max(time.monotonic() - self.started_at, 1e-9)
        audio_sec = self.num_frames / FRAME_RATE_HZ
        return (
            f"{self.task}: {self.num_done} of {self.num_jobs} recordings, "
            f"{format_duration(audio_sec)} of audio, {audio_sec / spent_sec:.1f} x real time"
        )
