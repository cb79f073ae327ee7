"""Ctrl-C, SIGTERM, SIGHUP: finish the step, save, leave; a second Ctrl-C leaves at once."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

_ONE_CTRL_C_SEC = 1.0
"""Signals this close are one: a Ctrl-C can come from the terminal and once more from a launcher,
or from a hand that presses twice."""
_LOOK_AGAIN_SEC = 0.05
"""Between two looks whether an import has ended."""


class _Asked:
    """When this process was first asked to stop; None: it was not."""

    at: float | None = None

    @classmethod
    def is_first(cls) -> bool:
        """Note that a signal has come. Returns whether none had come before."""
        if cls.at is not None:
            return False
        cls.at = time.monotonic()
        return True

    @classmethod
    def is_old(cls) -> bool:
        """Return whether a signal that comes now is another one than the first."""
        return cls.at is not None and time.monotonic() > cls.at + _ONE_CTRL_C_SEC


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


def _leave_at_once(number: int) -> NoReturn:
    """End this process with a message, wherever it is, without any clearing up."""
    os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


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

    The first one is raised as `Stopped`. While a module is imported it waits until it is, as some
    of them, in C, lose an exception or break by it; and where Python itself ignores an exception,
    as in `__del__`, it is raised again. What ends by it clears up: a second one does not disturb
    that in the first second, and later ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here = os.getpid()
    first: list[int] = []
    ignored_before = sys.unraisablehook
    _Asked.at = None

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:
            # In a process that was forked: it ends as if nobody had asked for more.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _Asked.is_first():
            first.append(number)
            look(signal.SIGALRM, frame)
        elif _Asked.is_old():
            _leave_at_once(number)

    def look(number: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise Stopped(first[0])
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_SEC)

    def ignored(what: Any) -> None:
        if isinstance(what.exc_value, Stopped) and os.getpid() == here:
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_SEC)
        else:
            ignored_before(what)

    previous = {number: signal.signal(number, stop) for number in stop_signals()}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, look)
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = ignored_before
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def held_signals() -> Iterator[None]:
    """Signals that ask to stop wait for the end of what runs in here, which is short: it calls C
    code that calls Python, and through C no exception passes. Python would print and forget it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous: dict[int, Any] = {}
    try:
        for number in map(int, (*stop_signals(), signal.SIGALRM)):
            if signal.getsignal(number) is not None:  # else it is handled in C, and stays so
                previous[number] = signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in came:
            if callable(previous[number]):
                previous[number](number, None)
            else:
                signal.raise_signal(number)


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
        self._previous: dict[int, object] = {}
        self._receive, self._send = socket.socketpair()

    def __enter__(self) -> "Interrupt":
        _Asked.at = None
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
        if self.signal_number is None:
            _Asked.is_first()
            self.signal_number = number
            logger.info(answer_to(number))
        elif number == signal.SIGINT and _Asked.is_old():
            _leave_at_once(number)
