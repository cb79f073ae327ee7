"""The configuration of test-time training: the `ttt` section of a run's YAML."""

from dataclasses import dataclass, fields
from typing import Literal

# Of which methods an option is; those that are not named here belong to all.
_IN_PLACE = (
    "write",
    "chunk_size",
    "learning_rate",
    "lr_scale",
    "target",
    "conv_kernel_size",
    "conv_lookahead",
    "chunk_edge",
    "max_delta_norm",
    "write_strength",
    "state_decay",
)
_LINEAR_AND_MLP = (
    "qk_conv_kernel_size",
    "num_heads",
    "mini_batch_size",
    "base_lr",
    "use_rope",
    "rope_theta",
    "gate_init",
    "scan_checkpoint_group_size",
)
MAX_WRITE_STRENGTH = 1e3
"""Upper bound of β. Above it, float32 no longer solves for a chunk's writes where keys are much
alike (docs/numerics.md)."""
_DEFAULT_BASE_LR = {"linear": 1.0, "mlp": 10.0}
_DEFAULT_BASE_LR_WITHOUT_CONV = {"linear": 1.0, "mlp": 0.1}
_DEFAULT_LEARNING_RATE = {"relative": 3.0, "none": 1e-3}


@dataclass
class TTTArgs:
    """Which layers learn at test time, and how."""

    enabled: bool = False
    """Whether the model has TTT layers."""

    method: Literal["in_place", "linear", "mlp"] = "in_place"
    """`in_place`: the output projection of the gated MLP is the fast weight. `linear`, `mlp`: new
    layers between attention and MLP, whose heads hold a linear map or a small MLP that learns."""

    start_layer: int = 5
    """The first layer with TTT, counted from 0."""

    layer_frequency: int = 6
    """Layers `start_layer + k * layer_frequency` have TTT; Moshi 7B: 5, 11, 17, 23, 29."""

    write: Literal["sum", "delta"] = "delta"
    """What a chunk writes. `delta`: what the fast weights do not know yet, by regularised least
    squares; it stays bounded on long streams. `sum`, the published rule: the sum of outer products
    of targets and MLP activations."""

    chunk_size: int = 256
    """Frames between two updates of the fast weights; 256 frames are 20.5 s."""

    lr_scale: Literal["none", "relative"] = "relative"
    """What the size of an update is relative to. `relative`: to nothing but the learned gate, as
    targets and activations are normalised where they are written. `none`: the published form, whose
    updates are as large as the norms of activations and embeddings make them."""

    learning_rate: float | None = None
    """Inner learning rate η, the step size of an update, for `write: sum`; null: 3 with `lr_scale:
    relative`, and 1e-3 with `none`, where a good one depends on the model: watch `ttt/*/effect` in
    the metrics, not this number."""

    write_strength: float = 10.0
    """How nearly a chunk's targets are met, for `write: delta`: the initial β, which every layer
    then learns. It has no unit, and is at most 1000."""

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

    chunk_edge: Literal["carry", "cut"] | None = None
    """What becomes of the last `conv_lookahead` frames of a chunk, whose targets lie partly in the
    next one. `carry`: the next chunk writes them, when their targets are complete. `cut`: they are
    written with zeros beyond the chunk for a target, as published; with `write: delta` that erases
    what is known of them. null: `carry`, and `cut` for the published form (`write: sum` with
    `lr_scale: none`)."""

    max_delta_norm: float | None = None
    """Upper bound τ on the Frobenius norm of one chunk's update, before η, for `write: sum`;
    null: no bound."""

    qk_conv_kernel_size: int = 4
    """Frames that a query and a key of `linear` and `mlp` are made of, each by a convolution of its
    own over one shared projection: so a key can be what came before its value. 1: no convolution,
    and a projection each for queries and keys; that form did not learn to recall."""

    num_heads: int | None = None
    """Heads of `linear` and `mlp`, each with fast weights as wide and high as a head; null: as many
    as attention has. Fewer and wider ones remember more."""

    mini_batch_size: int = 16
    """Frames between two updates of the fast weights (`linear`, `mlp`)."""

    base_lr: float | None = None
    """Inner learning rate, which the model scales frame by frame (`linear`, `mlp`); null: 1.0 for
    `linear`; 10 for `mlp`, and 0.1 with `qk_conv_kernel_size: 1`."""

    use_rope: bool = False
    """Turn the keys and queries of `linear` and `mlp` by their position in the mini-batch."""

    rope_theta: float = 10_000.0
    """How slowly the slowest pair of channels turns, with `use_rope`."""

    gate_init: float = 1.0
    """α at the start: the layers of `linear` and `mlp` are added with a weight of tanh(α). They add
    nothing yet, whatever it is, as their output projection starts at zero; the smaller it is, the
    slower that one gets to have an effect."""

    scan_checkpoint_group_size: int | None = None
    """Mini-batches that `linear` and `mlp` keep together for the backward pass: less memory for
    small groups, as only the fast weights are kept between them, and one pass forwards more. null:
    all of them with `gradient_checkpointing: true`, where one layer at a time keeps anything, if a
    kernel does the scan (on CUDA, for powers of two; see [mathematics.md](mathematics.md)); else
    16."""

    attention_context: int | None = None
    """Frames that attention sees in the TTT layers; null: as many as in the others. With
    `enabled: false` it still counts in these layers, so that a control run differs in TTT alone."""

    @property
    def update_frames(self) -> int:
        """Frames between two updates of the fast weights."""
        return self.chunk_size if self.method == "in_place" else self.mini_batch_size

    @property
    def has_fixed_step(self) -> bool:
        """Whether `learning_rate` and `max_delta_norm` count."""
        return self.method == "in_place" and self.write == "sum"

    @property
    def inner_learning_rate(self) -> float:
        """`learning_rate`, or its default for `lr_scale`."""
        if self.learning_rate is None:
            return _DEFAULT_LEARNING_RATE[self.lr_scale]
        return self.learning_rate

    @property
    def inner_base_lr(self) -> float:
        """`base_lr`, or its default for the method."""
        if self.base_lr is not None:
            return self.base_lr
        with_conv = self.qk_conv_kernel_size > 1
        return (_DEFAULT_BASE_LR if with_conv else _DEFAULT_BASE_LR_WITHOUT_CONV)[self.method]

    @property
    def lookahead_frames(self) -> int:
        """`conv_lookahead`, or its default."""
        return self.conv_kernel_size - 1 if self.conv_lookahead is None else self.conv_lookahead

    @property
    def carries(self) -> bool:
        """Whether `chunk_edge` is `carry`, chosen or by default."""
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

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with these values: pairs of field name and problem with its remedy."""
        found = [
            (name, f"must be at least {low}, got {getattr(self, name)}")
            for name, low in (
                ("start_layer", 0),
                ("layer_frequency", 1),
                ("chunk_size", 1),
                ("conv_kernel_size", 1),
                ("qk_conv_kernel_size", 1),
                ("num_heads", 1),
                ("mini_batch_size", 2),
                ("scan_checkpoint_group_size", 1),
            )
            if getattr(self, name) is not None and getattr(self, name) < low
        ]
        if not 0 <= self.inner_learning_rate < float("inf"):
            found.append(("learning_rate", f"must be 0 or more, got {self.learning_rate}"))
        elif (
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
        if not 0 < self.write_strength <= MAX_WRITE_STRENGTH:
            found.append(
                (
                    "write_strength",
                    f"must be above 0 and at most {MAX_WRITE_STRENGTH:g}, "
                    f"got {self.write_strength}",
                )
            )
        if not 0 < self.state_decay <= 1:
            found.append(("state_decay", f"must be above 0 and at most 1, got {self.state_decay}"))
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
        elif self.method == "in_place" and self.lag_frames >= self.chunk_size >= 1:
            found.append(
                (
                    "conv_lookahead",
                    f"is {self.lookahead_frames} frames, and must be less than chunk_size = "
                    f"{self.chunk_size} with chunk_edge: carry",
                )
            )
        if self.attention_context is not None and self.attention_context < 1:
            found.append(("attention_context", f"must be at least 1, got {self.attention_context}"))
        return found + self._linear_problems() + self.misplaced()

    def _linear_problems(self) -> list[tuple[str, str]]:
        found = []
        if self.base_lr is not None and not 0 <= self.base_lr < float("inf"):
            found.append(("base_lr", f"must be 0 or more, or null; got {self.base_lr}"))
        if not 1 < self.rope_theta < float("inf"):
            found.append(("rope_theta", f"must be more than 1, got {self.rope_theta}"))
        if self.gate_init == 0 or not abs(self.gate_init) < float("inf"):
            found.append(
                (
                    "gate_init",
                    f"must be a number other than 0, got {self.gate_init}: behind a closed gate "
                    "the output projection, which starts at zero, would never learn",
                )
            )
        return found

    def misplaced(self) -> list[tuple[str, str]]:
        """Options that were changed and that nothing would read: as `problems`."""
        others = _LINEAR_AND_MLP if self.method == "in_place" else _IN_PLACE
        owner = "linear and mlp" if self.method == "in_place" else "in_place"
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        found = [
            (name, f"is an option of method {owner}, and ttt.method is {self.method}; remove it")
            for name in others
            if name in changed
        ]
        for rule, name in (
            ("sum", "learning_rate"),
            ("sum", "max_delta_norm"),
            ("delta", "write_strength"),
        ):
            if self.method == "in_place" and self.write != rule and name in changed:
                found.append(
                    (
                        name,
                        f"belongs to write: {rule}, and write is {self.write}; "
                        f"remove it, or set write: {rule}",
                    )
                )
        if "rope_theta" in changed and self.method != "in_place" and not self.use_rope:
            found.append(("rope_theta", "has no effect with use_rope: false; remove it"))
        return found
