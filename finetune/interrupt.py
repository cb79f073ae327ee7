"""Ctrl-C and SIGTERM: finish the step, save, leave; a second Ctrl-C leaves at once."""

import logging
import os
import signal
import socket
import threading
import time

logger = logging.getLogger(__name__)

_ONE_CTRL_C_SEC = 1.0
"""Signals this close are one: a Ctrl-C can come from the terminal and once more from a launcher."""


class Interrupt:
    """While it is entered, the first signal is only noted, in `signal_number`.

    A thread of its own listens: a Python signal handler would wait for the end of whatever the
    main thread does in C, which a collective that hangs never reaches.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._noted_at = 0.0
        self._previous: dict[int, object] = {}
        self._receive, self._send = socket.socketpair()

    def __enter__(self) -> "Interrupt":
        self._send.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            # The handler itself does nothing; that there is one makes Python write to the socket.
            self._previous[number] = signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        self._send.close()

    def _listen(self) -> None:
        while received := self._receive.recv(1):
            self._note(received[0])
        self._receive.close()

    def _note(self, number: int) -> None:
        if number not in self._previous:
            return
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._noted_at = number, now
            logger.info(
                "%s: finishing this step, then saving. Ctrl-C (again) leaves at once.",
                signal.Signals(number).name,
            )
        elif number == signal.SIGINT and now > self._noted_at + _ONE_CTRL_C_SEC:
            os._exit(128 + number)
