"""Work ahead in a background thread."""

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of a generator, made in a thread of its own, up to `depth` ahead.

    They come in the generator's order. What it raises is raised here, after the items before it.
    """

    def __init__(self, source: Generator[T, None, None], depth: int) -> None:
        self._source = source
        self._free = threading.Semaphore(depth)
        self._items: queue.SimpleQueue[tuple[T] | BaseException] = queue.SimpleQueue()
        self._is_closed = False
        # A daemon, because Python waits for all others before it calls what is registered with
        # `atexit`; the generator must be closed, to end processes that it may have started.
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._is_closed:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._free.release()
        return item[0]

    def close(self) -> None:
        """Close the generator, when the item that it is making is done; a second call does
        nothing."""
        self._is_closed = True
        self._free.release()
        # The garbage collector may call this, in any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            with contextlib.closing(self._source):
                while self._free.acquire() and not self._is_closed:
                    self._items.put((next(self._source),))
        except BaseException as error:  # the end of the generator as well
            self._items.put(error)
