"""The TTT methods by name, and what is known of them without importing torch.

A method is one line here, a module in `ttt/layers` with its `TTTLayer`, and its options in
`ttt/config.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method has what a configuration is checked against, and where the layer is found."""

    layer: str
    """`module:Class`, a `ttt.layers.TTTLayer`; imported where a model is built."""
    text: str
    """What learns, as `moshi-ttt config ttt.method` and docs/configuration.md say it: whole
    sentences."""
    replaces_mlp: bool = False
    """Whether the layer takes the place of a gated MLP, and not one between attention and MLP."""
    update_option: str | None = None
    """The option of `TTTArgs` that says how many frames lie between two updates of the fast
    weights; None: every frame is an update."""
    also_reads: tuple[str, ...] = ()
    """Options of `TTTArgs` that are marked as other methods' and that this one reads as well: for
    methods that are registered from outside this package, and cannot stand in the marks."""


METHODS: dict[str, Method] = {
    "in_place": Method(
        "ttt.layers.in_place:InPlaceGating",
        "the output projection of the gated MLP is the fast weight.",
        replaces_mlp=True,
        update_option="chunk_size",
    ),
    "linear": Method(
        "ttt.layers.mixer:TTTLinear",
        "new layers between attention and MLP, whose heads hold a linear map that learns.",
        update_option="mini_batch_size",
    ),
    "mlp": Method(
        "ttt.layers.mixer:TTTMLP",
        "such layers, whose heads hold a small MLP that learns.",
        update_option="mini_batch_size",
    ),
}
"""The only list of methods."""


def method_texts() -> dict[str, str]:
    """Return what each method is, by name."""
    return {name: method.text for name, method in METHODS.items()}
