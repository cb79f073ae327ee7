"""Tells operators in which of the two forward passes of activation checkpointing they run.

The backward pass of a checkpointed layer runs its forward pass again, and uses what that second
pass has saved. What the first pass saves is discarded: an operator that computes something only to
save it can leave that out there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_discards: ContextVar[bool] = ContextVar("discards", default=False)


@contextmanager
def first_forward_pass() -> Iterator[None]:
    """Mark a forward pass that runs again before its backward pass."""
    token = _discards.set(True)
    try:
        yield
    finally:
        _discards.reset(token)


def discards_what_is_saved() -> bool:
    """Return whether what is saved now for a backward pass is never used."""
    return _discards.get()
