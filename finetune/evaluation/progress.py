"""A log line tells every few seconds how far an evaluation is."""

import logging
import time

from finetune.data import FRAME_RATE_HZ
from finetune.monitoring import format_duration

logger = logging.getLogger(__name__)

EVERY_SEC = 15.0


class Progress:
    """Counts frames of audio, or any other kind of work with `unit`.

    Args:
        total: what there is to do.
    """

    def __init__(self, task: str, total: int, *, unit: str = "frames") -> None:
        self.task = task
        self.total = total
        self.unit = unit
        self.done = 0
        self.started_at = self.told_at = time.monotonic()

    def advance(self, amount: int, what: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.told_at < EVERY_SEC or not self.done:
            return
        self.told_at = now
        spent_sec = now - self.started_at
        pace = ""
        if self.unit == "frames":
            pace = f"  {self.done / FRAME_RATE_HZ / spent_sec:.0f} x real time"
        eta = format_duration((self.total - self.done) * spent_sec / self.done)
        logger.info(
            "%s: %.0f %%%s%s  eta %s",
            self.task,
            100 * self.done / self.total,
            f"  {what}" if what else "",
            pace,
            eta,
        )
