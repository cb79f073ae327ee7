"""A setting of the whole process is held at a value while any thread needs it there.

To save such a setting, set it and restore it is not enough: of two threads that do so at once, the
first to leave takes the setting from the other, and the last to leave restores what the other one
had set, for good.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ProcessSetting(Generic[Value]):
    """One setting, and how many blocks hold it.

    Args:
        held: the value that it has within `holding`.
        read, write: of the setting.
    """

    def __init__(self, held: Value, read: Callable[[], Value], write: Callable[[Value], None]):
        self._held, self._read, self._write = held, read, write
        self._lock = threading.Lock()
        self._depth = 0
        self._outside: Value

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block the setting has the held value, and after the last of all threads'
        blocks that which it had before the first.

        Who changes it in between, from another thread, has it so afterwards; the next block that
        begins has the held value again.
        """
        with self._lock:
            now = self._read()
            if self._depth == 0 or now != self._held:
                self._outside = now
                self._write(self._held)
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0 and self._read() == self._held:
                    self._write(self._outside)
