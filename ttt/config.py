"""The configuration of test-time training: the `ttt` section of a run's YAML."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class TTTArgs:
    """Which layers learn at test time, and how."""

    enabled: bool = False
    """Whether the model has TTT layers."""

    method: Literal["in_place"] = "in_place"
    """`in_place`: the output projection of the gated MLP is the fast weight."""

    start_layer: int = 5
    """The first layer with TTT, counted from 0."""

    layer_frequency: int = 6
    """Layers `start_layer + k * layer_frequency` have TTT; Moshi 7B: 5, 11, 17, 23, 29."""

    write: Literal["sum", "delta"] = "sum"
    """What a chunk writes. `sum`: the sum of outer products of targets and MLP activations.
    `delta`: what the fast weights do not know yet, by regularised least squares; for long
    streams."""

    chunk_size: int = 256
    """Frames between two updates of the fast weights; 256 frames are 20.5 s."""

    learning_rate: float = 1e-3
    """Inner learning rate η, the step size of an update, for `write: sum`. Its effect depends on
    the norms of activations and targets: watch `ttt/*/effect` in the metrics, not this number."""

    write_strength: float = 10.0
    """How nearly a chunk's targets are met, for `write: delta`: the initial β, which every layer
    then learns. It has no unit."""

    state_decay: float = 1.0
    """How much of the fast weights' change outlives each chunk: γ, above 0; 1: all of it."""

    target: Literal["text", "input", "hidden"] = "text"
    """What is written: a function of the text embedding (`text`), of the sum of all streams'
    embeddings (`input`), or of the MLP's own normalised input (`hidden`)."""

    conv_kernel_size: int = 2
    """Frames that one target is made of."""

    conv_lookahead: int | None = None
    """How many of these frames lie ahead; null: `conv_kernel_size - 1`. Looking ahead leaks
    nothing, because a chunk is written only once it has ended."""

    max_delta_norm: float | None = None
    """Upper bound τ on the Frobenius norm of one chunk's update, before η, for `write: sum`;
    null: no bound."""

    @property
    def lookahead_frames(self) -> int:
        return self.conv_kernel_size - 1 if self.conv_lookahead is None else self.conv_lookahead

    def layers(self, num_layers: int) -> list[int]:
        """The indices of the TTT layers in a transformer of `num_layers` layers.

        Raises:
            ValueError: there would be none.
        """
        if not self.enabled:
            return []
        layers = list(range(self.start_layer, num_layers, self.layer_frequency))
        if not layers:
            raise ValueError(
                f"ttt.start_layer: {self.start_layer} is beyond the model's last layer, "
                f"{num_layers - 1}; no layer would learn. Choose a smaller one."
            )
        return layers

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with these values: pairs of field name and problem with its remedy."""
        found = [
            (name, f"must be at least {low}, got {getattr(self, name)}")
            for name, low in (
                ("start_layer", 0),
                ("layer_frequency", 1),
                ("chunk_size", 1),
                ("conv_kernel_size", 1),
            )
            if getattr(self, name) < low
        ]
        if not 0 <= self.learning_rate < float("inf"):
            found.append(("learning_rate", f"must be 0 or more, got {self.learning_rate}"))
        if not 0 < self.write_strength < float("inf"):
            found.append(("write_strength", f"must be positive, got {self.write_strength}"))
        if not 0 < self.state_decay <= 1:
            found.append(("state_decay", f"must be above 0 and at most 1, got {self.state_decay}"))
        defaults = TTTArgs()
        for rule, name in (
            ("sum", "learning_rate"),
            ("sum", "max_delta_norm"),
            ("delta", "write_strength"),
        ):
            if self.write != rule and getattr(self, name) != getattr(defaults, name):
                found.append(
                    (
                        name,
                        f"belongs to write: {rule}, and write is {self.write}; "
                        f"remove it, or set write: {rule}",
                    )
                )
        if self.max_delta_norm is not None and not self.max_delta_norm > 0:
            found.append(
                (
                    "max_delta_norm",
                    f"must be positive, or null for no bound; got {self.max_delta_norm}",
                )
            )
        if self.conv_kernel_size >= 1 and not 0 <= self.lookahead_frames < self.conv_kernel_size:
            found.append(
                (
                    "conv_lookahead",
                    f"must lie between 0 and conv_kernel_size - 1 = {self.conv_kernel_size - 1}, "
                    f"got {self.conv_lookahead}",
                )
            )
        return found
