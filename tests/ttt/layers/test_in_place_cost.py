"""What `InPlaceGating.cost` says of memory, against what autograd keeps."""

import dataclasses

import torch
from helpers import moshi_like

from ttt import TTTArgs, build_model
from ttt.layers import layer_class

WIDTH, NUM_FRAMES = 256, 1024


def kept_bytes(args: TTTArgs) -> int:
    """What a layer whose base is frozen keeps for its backward pass, beside its parameters."""
    kwargs = moshi_like(dim=WIDTH, num_heads=4)
    model = build_model(kwargs, args, device="cpu", dtype=torch.bfloat16)
    layer = model.ttt_layers[0]
    layer.linear_in.requires_grad_(False)
    layer.linear_out.requires_grad_(False)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, NUM_FRAMES, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    embeddings = torch.randn(1, NUM_FRAMES, WIDTH, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x, embeddings, None)
    assert out.requires_grad
    return sum(kept.values())


def test_the_mlps_input_as_a_target_is_counted() -> None:
    """Never less than is kept, and not much more."""
    hidden = TTTArgs(enabled=True, start_layer=0, layer_frequency=1, chunk_size=64)
    text = dataclasses.replace(hidden, target="text")
    assert hidden.target == "hidden"
    more = kept_bytes(hidden) - kept_bytes(text)
    costs = [layer_class("in_place").cost(args) for args in (hidden, text)]
    counted, without = (cost.bytes_per_frame for cost in costs if cost is not None)
    counted -= without
    assert 0 < more / NUM_FRAMES * 4096 / WIDTH <= counted <= 8 * 4096
