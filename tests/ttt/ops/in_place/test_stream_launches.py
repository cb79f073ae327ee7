"""What a frame of a stream on a GPU costs beside its arithmetic: the operations that it starts."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import tiny_args, tiny_delta_args, tiny_model, tiny_relative_args
from torch.utils._python_dispatch import TorchDispatchMode

from ttt import TTTArgs
from ttt.layers.in_place import InPlaceGating

triton = pytest.importorskip("triton")


class Started(TorchDispatchMode):
    """The names of operations that run something on a device: what makes views, and what makes
    room, does not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        makes_a_tensor = any(str(r.type) == "Tensor" for r in returns)
        if makes_a_tensor and not is_view and not func.name().startswith(WITHOUT_WORK):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


WITHOUT_WORK = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach")


@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    ("args", "most"),
    [
        (tiny_relative_args(write="delta"), 14),
        (tiny_delta_args(), 14),
        (tiny_relative_args(), 11),
        (tiny_args(max_delta_norm=0.5), 13),
    ],
    ids=["relative delta", "delta", "relative sum", "bounded sum"],
)
def test_a_frame_starts_few_operations_in_a_layer(
    args: TTTArgs, most: int, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 2 to 3 µs of every frame and layer of a stream, as long as a CUDA graph lives, and
    however small it is: forty-three of them were more than half of what TTT added to a frame of
    Moshi 7B. Two are products that the layer has without TTT, and two its activation.

    Who needs one more here finds room for it in a kernel that is there, or makes it once a frame
    for all layers, or measures what it costs (benchmarks/streaming.py) and says so.
    """
    started = Started()
    monkeypatch.setattr(
        triton.runtime.jit.KernelInterface,
        "__getitem__",
        lambda kernel, grid: lambda *args, **kwargs: started.names.append(kernel.fn.__name__),
    )
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    # A CPU takes the way of a GPU, without the arithmetic of the kernels.
    monkeypatch.setattr(InPlaceGating, "_stream_frames", InPlaceGating._stream_frame)
    model = tiny_model(args, dtype=torch.bfloat16)
    x = torch.randn(1, 1, model.dim, dtype=model.dtype)
    is_frame = torch.tensor([[not is_padded]])
    with torch.no_grad(), model.streaming(1), started:
        model.ttt_layers[0](x, x, is_frame)
    assert "read_kernel" in started.names
    assert len(started.names) <= most, started.names
