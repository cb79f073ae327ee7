"""Switches and measurements of a TTT layer while it streams do not depend on the method."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class Streamed:
    """Part of every TTT layer that lets rows do without TTT, and sees how much TTT does."""

    is_change: ClassVar[bool] = False
    """Whether the fast weights are a change, added to trained weights, and not weights of their
    own."""

    measures_stream = False
    """Whether steps of a stream leave `stream_effect`; set it before the first."""
    stream_effect: Tensor | None = None
    """[B], ‖what TTT adds‖ / ‖what it is added to‖ of the last step."""

    _streaming_state: Any

    def streamed(self, added: Tensor, to: Tensor) -> Tensor:
        """Return what a step of a stream adds to `to`: `added` [B, T, d], and zero in rows that are
        switched off. A layer whose `added` is zero there already calls `note_effect` alone."""
        if self._streaming_state is not None:
            added = self.in_rows_on(added)
        self.note_effect(added, to)
        return added

    def in_rows_on(self, added: Tensor) -> Tensor:
        """Return `added` [B, T, d], and zero in rows of the stream that are switched off."""
        return torch.where(self._streaming_state.rows_on.view(-1, 1, 1), added, 0.0)

    def note_effect(self, added: Tensor, to: Tensor) -> None:
        """Measure what a step of a stream adds to `to`, if somebody asks for it."""
        if self.measures_stream:
            part, whole = (x.detach().float().flatten(1).norm(dim=1) for x in (added, to))
            self.stream_effect = part / whole.clamp(min=torch.finfo(torch.float32).tiny)

    def open_frames(self) -> Tensor | None:
        """Return how many frames each row of a stream has in its open chunk, [B]; None if a frame
        in which many rows end theirs takes no longer than one in which few do."""
        return None

    @abstractmethod
    def start_weights(self) -> list[Tensor]:
        """Return the weights that a stream starts from, in the order of its `fast_weights`."""

    @torch.no_grad()
    def start_norm(self) -> Tensor:
        """Return ‖W0‖, of all weights that a stream starts from."""
        squares = [weight.float().square().sum() for weight in self.start_weights()]
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def stream_change(self, start_norm: Tensor | None = None) -> Tensor:
        """Return ‖W − W0‖ / ‖W0‖ of each row of a stream, float32 [B]; ‖W‖ where W0 is zero.

        Args:
            start_norm: of `start_norm`, if it is known; W0 is not read for it then.
        """
        fast = self._streaming_state.fast_weights()
        changes = fast
        if not self.is_change:
            starts = self.start_weights()
            changes = [w - start.to(w.dtype) for w, start in zip(fast, starts, strict=True)]
        squares = [change.flatten(1).norm(dim=1).square() for change in changes]
        norm = self.start_norm() if start_norm is None else start_norm
        return (torch.stack(squares).sum(0).sqrt() / torch.where(norm > 0, norm, 1.0)).float()
