"""Switches and measurements of a TTT layer while it streams, which do not depend on the method."""

import torch
from torch import Tensor

_FAST = ("change", "w1", "b1", "w2", "b2")


class Streamed:
    """A part of every TTT layer: lets rows do without what is learnt, and sees how much it does."""

    rows_on: Tensor | None = None
    """[B], rows of a stream that use TTT; None: all. See `ttt.use_in_rows`."""
    measures_stream = False
    """Whether steps of a stream leave `stream_effect`; set it before the first."""
    stream_effect: Tensor | None = None
    """[B], ‖what TTT adds‖ / ‖what it is added to‖ of the last step."""

    def streamed(self, added: Tensor, to: Tensor) -> Tensor:
        """Return what a step of a stream adds to `to`: `added` [B, T, d], and zero in rows that are
        switched off."""
        if self.rows_on is not None:
            added = torch.where(self.rows_on.view(-1, 1, 1), added, 0.0)
        if self.measures_stream:
            part, whole = (x.detach().float().flatten(1).norm(dim=1) for x in (added, to))
            self.stream_effect = part / whole.clamp(min=torch.finfo(torch.float32).tiny)
        return added

    def start_weights(self) -> list[Tensor]:
        """Return the weights that a stream starts from, in the order of `stream_weights`."""
        raise NotImplementedError

    def stream_weights(self) -> dict[str, Tensor]:
        """Return the fast weights of a stream, [B, ...], by their names in its state: weights
        themselves, or `change`, what is added to those that it starts from."""
        tensors = self._streaming_state.tensors()  # type: ignore[attr-defined]
        return {name: weight for name, weight in tensors.items() if name in _FAST}

    @torch.no_grad()
    def start_norm(self) -> Tensor:
        """Return ‖W0‖, of all weights that a stream starts from."""
        squares = [weight.float().square().sum() for weight in self.start_weights()]
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def stream_change(self) -> Tensor:
        """Return ‖W − W0‖ / ‖W0‖ of each row of a stream, float32 [B]."""
        pairs = zip(self.stream_weights().items(), self.start_weights(), strict=True)
        changes = [w if name == "change" else w - start.to(w.dtype) for (name, w), start in pairs]
        squares = [change.flatten(1).norm(dim=1).square() for change in changes]
        return (torch.stack(squares).sum(0).sqrt() / self.start_norm()).float()
