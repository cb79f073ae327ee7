"""Tells operators in which of the two forward passes of activation checkpointing they run.

The backward pass of a checkpointed layer runs its forward pass again, and uses what that second
pass has saved. What the first pass saves is discarded: an operator that computes something only to
save it can leave that out there. What costs much to make and little to keep, it can keep in the
first pass for the second.
"""

from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor


@dataclass
class _Pass(AbstractContextManager[None]):
    """One of a checkpointed function's forward passes; can be entered again."""

    is_first: bool
    shelf: list[tuple[Tensor, ...]] | None
    """What the operators have kept, one after the other; None: nothing may be kept."""
    num_taken: int = 0
    _tokens: list[Token["_Pass | None"]] = field(default_factory=list)

    def __enter__(self) -> None:
        self.num_taken = 0
        self._tokens.append(_current.set(self))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _current.reset(self._tokens.pop())


_current: ContextVar[_Pass | None] = ContextVar("current", default=None)


def forward_passes(
    *, may_keep: bool
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a function's first forward pass and for those that make it again.

    Args:
        may_keep: operators may keep what they have made. One that does not keep its result returns
            NaN when it runs again: right where that is only added to something, as then no gradient
            needs it.
    """
    shelf: list[tuple[Tensor, ...]] | None = [] if may_keep else None
    return _Pass(True, shelf), _Pass(False, shelf)


def discards_what_is_saved() -> bool:
    """Return whether what is saved now for a backward pass is never used."""
    current = _current.get()
    return current is not None and current.is_first


def may_keep() -> bool:
    """Return whether what is kept now is there when the operator runs again."""
    current = _current.get()
    return current is not None and current.is_first and current.shelf is not None


def keep(tensors: tuple[Tensor, ...]) -> None:
    """Keep tensors for when the operator runs again; only where `may_keep` says so.

    Without their history: a result would keep the graph that keeps this, and all of it would stay
    in memory where no backward pass follows.
    """
    current = _current.get()
    assert current is not None and current.shelf is not None
    current.shelf.append(tuple(x.detach() for x in tensors))


def kept() -> tuple[Tensor, ...] | None:
    """Return what the operator that runs again has kept; None where it has to do its work. To be
    called once each time, as operators run in the same order."""
    current = _current.get()
    if current is None or current.is_first or current.shelf is None:
        return None
    current.num_taken += 1
    return current.shelf[current.num_taken - 1]
