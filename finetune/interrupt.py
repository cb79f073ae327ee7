"""Ctrl-C, SIGTERM, SIGHUP: finish the step, save, leave; a second Ctrl-C leaves at once."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_ONE_CTRL_C_SEC = 1.0
"""Signals this close are one: a Ctrl-C can come from the terminal and once more from a launcher."""
_LOOK_AGAIN_SEC = 0.05
"""Between two looks whether an import has ended."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask to stop: Ctrl-C, a scheduler's, and that of a terminal which is gone
    (unless `nohup` has it ignored)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def answer_to(number: int) -> str:
    """Return what a run does after the first signal, and how it is left at once."""
    name = signal.Signals(number).name
    return f"{name}: finishing this step, then saving. Ctrl-C (again) leaves at once."


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop, where nothing is to be finished first."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """The signal that has ended a command."""
    number = error.signal_number if isinstance(error, Stopped) else signal.SIGINT
    return signal.Signals(number)


def end_with_parent() -> None:
    """End this process, a worker, as soon as the one that started it is gone, however it went.

    Else a worker would finish its job for nobody, for minutes, and then wait for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_workers() -> None:
    """End the processes that this one has started, in the middle of their jobs."""
    for worker in multiprocessing.active_children():
        worker.terminate()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Signals that ask to stop end what runs in here as Ctrl-C does, so that it is cleared up;
    where no step is under way that should be finished. See `Interrupt` for the others.

    While a module is imported the first one waits until it is, as some of them, in C, lose an
    exception or break by it, and the second ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here = os.getpid()
    waiting: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:
            # In a process that was forked: it ends as if nobody had asked for more.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not _is_importing(frame):
            raise Stopped(number)
        if waiting:
            os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        waiting.append(number)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_SEC)

    def look_again(number: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise Stopped(waiting[0])
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_SEC)

    previous = {number: signal.signal(number, stop) for number in stop_signals()}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, look_again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


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
        for number in stop_signals():
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
            logger.info(answer_to(number))
        elif number == signal.SIGINT and now > self._noted_at + _ONE_CTRL_C_SEC:
            os._exit(128 + number)
