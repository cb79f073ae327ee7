"""Ctrl-C and SIGTERM: finish the step, save, leave; a second Ctrl-C leaves at once."""

import logging
import os
import signal
import time
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)


class Interrupt:
    """While it is entered, the first signal is only noted, in `signal_number`."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._noted_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # torchrun passes a Ctrl-C on that the terminal has sent to everybody: that is one, not two.
        if self.signal_number is not None and number == signal.SIGINT and now > self._noted_at + 1:
            # Not an exception: whatever would clean up might be what hangs.
            os._exit(128 + number)
        if self.signal_number is None:
            self.signal_number, self._noted_at = number, now
            logger.info(
                "%s: finishing this step, then saving. Ctrl-C (again) leaves at once.",
                signal.Signals(number).name,
            )
