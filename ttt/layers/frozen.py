"""Linear layers whose weights do not train, kept in fewer bits."""

from collections.abc import Callable, Iterator

import torch
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from ttt.ops.frozen import FrozenWeight, freeze, frozen_product, layout, thaw


class FrozenLinear(nn.Module):
    """A linear layer without bias in the place of an `nn.Linear` that does not train.

    Its weight is in two buffers, no parameter: nothing sums its gradient, and FSDP leaves it whole
    in every process. A state dict with `weight`, as stock checkpoints have it, is taken too.

    Args:
        linear: the layer to be replaced; on `meta`, the weight comes later.
        kind: of `ttt.ops.frozen.KINDS`.
    """

    kind: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Of the weight before and after."""
    values: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        assert linear.bias is None, "the linear layers of Moshi's transformers have no bias"
        self.kind = kind
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.dtype = linear.weight.dtype
        places = layout(kind, self.out_features, self.in_features)
        for name, (shape, dtype) in places._asdict().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        if not linear.weight.is_meta:
            self.set_weight(linear.weight)

    @property
    def frozen_weight(self) -> FrozenWeight:
        return FrozenWeight(
            self.kind, self.values, self.scales, self.out_features, self.in_features
        )

    @property
    def is_filled(self) -> bool:
        return not self.values.is_meta

    def thawed(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the matrix [out, in] that its weight stands for."""
        return thaw(self.frozen_weight, dtype or self.dtype)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take a weight [out, in]."""
        assert weight.shape == self.frozen_weight.shape
        _, self.values, self.scales, *_ = freeze(weight, self.kind)

    def unfrozen(self) -> nn.Linear:
        """Return a layer on `meta` like the one that this replaces."""
        return nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.frozen_weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            device = weight.device if self.values.is_meta else self.values.device
            self.set_weight(weight.to(device, self.dtype))
            state_dict |= {f"{prefix}values": self.values, f"{prefix}scales": self.scales}
        elif not self.is_filled and {f"{prefix}values", f"{prefix}scales"} <= state_dict.keys():
            # What is copied onto `meta` is lost.
            for name in ("values", "scales"):
                given = state_dict[f"{prefix}{name}"]
                setattr(self, name, torch.empty_like(getattr(self, name), device=given.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLinear":
        """Move the weight; `to(dtype)` changes the type that it stands for, and never its own,
        which is part of its format."""
        for name in ("values", "scales"):
            kept = getattr(self, name)
            made = fn(kept)
            setattr(self, name, made if made.dtype == kept.dtype else kept.to(made.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        return self


class FrozenAttention(StreamingMultiheadAttention):
    """Attention whose projections are frozen: stock `moshi` asks the first one for its weight, to
    know where and in which type a stream's keys are kept."""

    in_projs: nn.ModuleList

    def _init_streaming_state(self, batch_size: int):  # type: ignore[no-untyped-def]
        frozen = self.in_projs
        first = frozen[0]
        assert isinstance(first, FrozenLinear)
        self.in_projs = nn.ModuleList(
            [nn.Linear(1, 1, device=first.values.device, dtype=first.dtype)]
        )
        try:
            return super()._init_streaming_state(batch_size)
        finally:
            self.in_projs = frozen


def frozen_linears(module: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """Yield the frozen layers in a module, by name."""
    for name, each in module.named_modules():
        if isinstance(each, FrozenLinear):
            yield name, each


def num_frozen(module: nn.Module) -> int:
    """Return the number of weights in frozen layers; `parameters()` does not have them."""
    return sum(each.out_features * each.in_features for _, each in frozen_linears(module))


def frozen_bytes(module: nn.Module) -> int:
    """Return the bytes that weights in frozen layers take."""
    return sum(each.values.nbytes + each.scales.nbytes for _, each in frozen_linears(module))


def freeze_linears(module: nn.Module, kind: str, *, skip: set[nn.Module]) -> None:
    """Replace the linear layers in a module, those within LoRA's without its adapters.

    Args:
        skip: layers that stay.
    """
    for name, child in list(module.named_children()):
        if child in skip or name in ("lora_A", "lora_B"):
            continue
        if isinstance(child, nn.Linear):
            setattr(module, name, FrozenLinear(child, kind))
        else:
            freeze_linears(child, kind, skip=skip)
    if isinstance(module, StreamingMultiheadAttention) and isinstance(
        module.in_projs[0], FrozenLinear
    ):
        module.__class__ = FrozenAttention


def thaw_linears(module: nn.Module) -> None:
    """Replace the frozen layers in a module by linear layers with the weights that they stand
    for."""
    for name, child in list(module.named_children()):
        if isinstance(child, FrozenLinear):
            linear = child.unfrozen()
            linear.weight = nn.Parameter(child.thawed(), requires_grad=False)
            setattr(module, name, linear)
        else:
            thaw_linears(child)
    if isinstance(module, FrozenAttention):
        module.__class__ = StreamingMultiheadAttention
