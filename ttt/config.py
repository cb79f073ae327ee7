"""The configuration of test-time training: the `ttt` section of a run's YAML."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator

from ttt.options import (
    HARMLESS,
    IN_PLACE,
    IN_PLACE_AND_MLP,
    INNER_LOOP,
    LARGEST,
    Count,
    Frames,
    Methods,
    NonNegative,
    OneOf,
    Positive,
    marks,
    out_of_bounds,
)
from ttt.registry import METHODS, method_texts

MAX_WRITE_STRENGTH = 1e3
"""Upper bound of β. Above it, float32 no longer solves for a chunk's writes where keys are much
alike (docs/numerics.md)."""
MLP_KERNEL_SIZES = (16, 32)
"""Sizes of mini-batches that the GPU kernels of `mlp` take."""
_DEFAULT_LEARNING_RATE = {"relative": 3.0, "none": 1e-3}


def _open_gate(gate: float) -> float:
    if gate == 0:
        raise ValueError(
            "must be a number other than 0, got 0.0: behind a closed gate the output projection, "
            "which starts at zero, would never learn"
        )
    return gate


Gate = Annotated[float, Ge(-LARGEST), Le(LARGEST), AfterValidator(_open_gate)]
Heads = Annotated[int, Ge(1), Le(10**4)]


@dataclass
class TTTArgs:
    """Options of the layers that learn at test time."""

    enabled: bool = False
    """Whether the model has TTT layers."""

    method: Annotated[str, OneOf(METHODS.keys, method_texts)] = "in_place"
    """What learns, and where."""

    start_layer: Annotated[int, Ge(0), Le(10**4)] = 5
    """The first layer with TTT, counted from 0."""

    layer_frequency: Count = 6
    """Layers `start_layer + k * layer_frequency` have TTT; Moshi 7B: 5, 11, 17, 23, 29."""

    write: Annotated[Literal["sum", "delta"], IN_PLACE] = "delta"
    """What a chunk writes. `delta`: what the fast weights do not know yet, by regularized least
    squares; it stays bounded on long streams. `sum`, the published rule: the sum of outer products
    of targets and MLP activations; set `target: text` with it, as published: with `hidden` it
    learned in two of three runs on tokens."""

    chunk_size: Annotated[Frames, IN_PLACE] = 256
    """Frames between two updates of the fast weights; 256 frames are 20.5 s."""

    lr_scale: Annotated[Literal["none", "relative"], IN_PLACE] = "relative"
    """What the size of an update is relative to. `relative`: to nothing but the learned gate, as
    targets and activations are normalized where they are written. `none`: the published form, whose
    updates are as large as the norms of activations and embeddings make them."""

    learning_rate: Annotated[NonNegative | None, IN_PLACE] = None
    """Inner learning rate η, the step size of an update, for `write: sum`; null: 3 with `lr_scale:
    relative`, and 1e-3 with `none`, where a good one depends on the model: watch `ttt/*/effect` in
    the metrics, not this number."""

    write_strength: Annotated[float, Gt(0), Le(MAX_WRITE_STRENGTH), IN_PLACE] = 10.0
    """How nearly a chunk's targets are met, for `write: delta`: the initial β, which every layer
    then learns. It has no unit, and is at most 1000."""

    state_decay: Annotated[float, Gt(0), Le(1), IN_PLACE] = 1.0
    """How much of the fast weights' change outlives each chunk: γ, above 0; 1: all of it."""

    target: Annotated[Literal["text", "input", "hidden"], IN_PLACE] = "hidden"
    """What is written: a function of the MLP's own normalized input (`hidden`), of the sum of all
    streams' embeddings (`input`), or of the text embedding (`text`, as published). `hidden` holds
    what the layers below made of all streams, the user's speech included, which has no text: what
    only the user had said was learned in some 60 % of the steps that the others took. Models with
    `text` and `input` remembered longer, in one run each (docs/evidence.md)."""

    conv_kernel_size: Annotated[int, Ge(1), Le(4096), IN_PLACE] = 2
    """Frames that one target is made of."""

    conv_lookahead: Annotated[int | None, IN_PLACE] = None
    """How many of these frames lie ahead; null: `conv_kernel_size - 1`. Looking ahead leaks
    nothing, because a chunk is written only once it has ended."""

    chunk_edge: Annotated[Literal["carry", "cut"] | None, IN_PLACE] = None
    """What becomes of the last `conv_lookahead` frames of a chunk, whose targets lie partly in the
    next one. `carry`: the next chunk writes them, when their targets are complete. `cut`: they are
    written with zeros beyond the chunk for a target, as published; with `write: delta` that erases
    what is known of them. null: `carry`, and `cut` for the published form (`write: sum` with
    `lr_scale: none`)."""

    max_delta_norm: Annotated[Positive | None, IN_PLACE] = None
    """Upper bound τ on the Frobenius norm of one chunk's update, before η, for `write: sum`;
    null: no bound."""

    keep_writes: Annotated[bool, IN_PLACE_AND_MLP, HARMLESS] = True
    """With `gradient_checkpointing: true`, keep what the chunks of a layer write (`write: delta`),
    or the mini-batches (`mlp`, where the GPU kernels run and with `scan_checkpoint_group_size:
    null`), for the backward pass, which makes all else of the layer again: a step of Moshi 7B takes
    1 % less time, and up to 18 kB more for each frame and layer; with `mlp`, as reckoned from its
    operator, 4 % and 120 kB."""

    qk_conv_kernel_size: Annotated[int, Ge(1), Le(4096), INNER_LOOP] = 4
    """Frames that a query and a key of `linear` and `mlp` are made of, each by a convolution of its
    own over one shared projection: so a key can be what came before its value. 1: no convolution,
    and a projection each for queries and keys; that form did not learn to recall."""

    num_heads: Annotated[Heads | None, INNER_LOOP] = None
    """Heads of `linear` and `mlp`, each with fast weights as wide and high as a head; null: as many
    as attention has. Fewer and wider ones remember more."""

    mini_batch_size: Annotated[int, Ge(2), Le(10**6), INNER_LOOP] = 16
    """Frames between two updates of the fast weights (`linear`, `mlp`)."""

    base_lr: Annotated[NonNegative | None, INNER_LOOP] = None
    """Inner learning rate, which the model scales frame by frame (`linear`, `mlp`); null: 1.0 for
    `linear`; 10 for `mlp`, and 0.1 with `qk_conv_kernel_size: 1`."""

    use_rope: Annotated[bool, INNER_LOOP] = False
    """Turn the keys and queries of `linear` and `mlp` by their position in the mini-batch."""

    rope_theta: Annotated[float, Gt(1), Le(LARGEST), INNER_LOOP] = 10_000.0
    """How slowly the slowest pair of channels turns, with `use_rope`."""

    gate_init: Annotated[Gate, INNER_LOOP] = 1.0
    """α at the start: the layers of `linear` and `mlp` are added with a weight of tanh(α). They add
    nothing yet, whatever it is, as their output projection starts at zero; the smaller it is, the
    slower that one gets to have an effect."""

    scan_checkpoint_group_size: Annotated[Count | None, INNER_LOOP, HARMLESS] = None
    """Mini-batches that `linear` and `mlp` keep together for the backward pass: less memory for
    small groups, as only the fast weights are kept between them, and one pass forwards more. (On a
    GPU `mlp` takes blocks of 64 frames: groups of fewer take as long as these.) null:
    all of them with `gradient_checkpointing: true`, where one layer at a time keeps anything, if a
    kernel does the scan (on CUDA, for powers of two; see [mathematics.md](mathematics.md)); else
    16."""

    attention_context: Frames | None = None
    """Frames that attention sees in the TTT layers; null: as many as in the others. With
    `enabled: false` it still counts in these layers, so that a control run differs in TTT alone."""

    @property
    def update_frames(self) -> int:
        """Frames between two updates of the fast weights."""
        option = METHODS[self.method].update_option
        frames: int = getattr(self, option) if option else 1
        return frames

    def reads(self, option: str) -> bool:
        """Return whether the chosen method reads an option."""
        owners = marks(type(self), Methods).get(option)
        is_marked = owners is None or self.method in owners.names
        return is_marked or option in METHODS[self.method].also_reads

    @property
    def has_fixed_step(self) -> bool:
        """Return whether `learning_rate` and `max_delta_norm` count."""
        return self.reads("write") and self.write == "sum"

    @property
    def keeps_writes(self) -> bool:
        """Return whether there is something that `keep_writes` keeps."""
        is_sum = self.reads("write") and self.write == "sum"
        # Where the kernels run, and all mini-batches are one group.
        is_whole = self.method != "mlp" or (
            self.scan_checkpoint_group_size is None and self.mini_batch_size in MLP_KERNEL_SIZES
        )
        is_read = self.reads("keep_writes") and not is_sum and is_whole
        return self.enabled and is_read and self.keep_writes

    @property
    def inner_learning_rate(self) -> float:
        """`learning_rate`, or its default for `lr_scale`."""
        if self.learning_rate is None:
            return _DEFAULT_LEARNING_RATE[self.lr_scale]
        return self.learning_rate

    @property
    def lookahead_frames(self) -> int:
        """`conv_lookahead`, or its default."""
        return self.conv_kernel_size - 1 if self.conv_lookahead is None else self.conv_lookahead

    @property
    def carries(self) -> bool:
        """Return whether `chunk_edge` is `carry`, chosen or by default."""
        if self.chunk_edge is None:
            return not (self.write == "sum" and self.lr_scale == "none")
        return self.chunk_edge == "carry"

    @property
    def lag_frames(self) -> int:
        """Frames that a key waits for its target, beyond the end of its chunk if need be."""
        return self.lookahead_frames if self.carries else 0

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

    def problems(self, given: Collection[str] = ()) -> list[tuple[str, str]]:
        """Return what is wrong with these values: pairs of field name and problem with its
        remedy.

        Args:
            given: fields that somebody has set, be it to their defaults.
        """
        found = [*out_of_bounds(self)]
        if self.method not in METHODS:
            return found
        if (
            self.enabled
            and self.has_fixed_step
            and self.lr_scale == "relative"
            and 0 < self.inner_learning_rate < 0.01 * 3.0
        ):
            found.append(
                (
                    "learning_rate",
                    f"is {self.learning_rate:g}, and with lr_scale: relative a hundredth of the "
                    "default, 3, does next to nothing. Leave it out, or set lr_scale: none for the "
                    "published form, which such numbers are for",
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
        elif self.reads("chunk_edge") and self.lag_frames >= self.chunk_size >= 1:
            found.append(
                (
                    "conv_lookahead",
                    f"is {self.lookahead_frames} frames, and must be less than chunk_size = "
                    f"{self.chunk_size} with chunk_edge: carry",
                )
            )
        return [*found, *self.misplaced(given)]

    def misplaced(self, given: Collection[str] = ()) -> list[tuple[str, str]]:
        """Options that were set and that nothing would read: arguments and result as of
        `problems`."""
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        changed.update(given)
        found = [
            (name, f"is an option of method {owner}, and ttt.method is {self.method}; remove it")
            for name, owner in marks(type(self), Methods).items()
            if name in changed and not self.reads(name)
        ]
        for rule, name in (
            ("sum", "learning_rate"),
            ("sum", "max_delta_norm"),
            ("delta", "write_strength"),
            ("delta", "keep_writes"),
        ):
            if self.reads("write") and self.write != rule and name in changed:
                found.append(
                    (
                        name,
                        f"belongs to write: {rule}, and write is {self.write}; "
                        f"remove it, or set write: {rule}",
                    )
                )
        if "rope_theta" in changed and self.reads("rope_theta") and not self.use_rope:
            found.append(("rope_theta", "has no effect with use_rope: false; remove it"))
        return found
