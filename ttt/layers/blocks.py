"""The parts of a stock Moshi layer as functions of their weights, for whole sequences.

The stock modules hold the weights, and stream; these compute the same for training. A function of
tensors compiles once for all layers, and one step of the depth transformer, whose weights differ by
step, is the same function with one more dimension.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear
from moshi.modules.transformer import (
    LayerNormF32,
    LayerScale,
    RMSNorm,
    StreamingMultiheadAttention,
    StreamingTransformerLayer,
)
from torch import Tensor, nn

from ttt.layers.frozen import FrozenLinear
from ttt.ops.frozen import FrozenWeight, frozen_product, frozen_products
from ttt.ops.moshi.attention import causal_attention
from ttt.ops.moshi.depth_attention import depth_attention
from ttt.ops.moshi.turned import turned
from ttt.ops.rope import RopeTable


class FrozenWeights(NamedTuple):
    """Weights of K frozen layers of one shape."""

    each: tuple[FrozenWeight, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.each), *self.each[0].shape))


class Linear(NamedTuple):
    """A linear layer with or without LoRA; with a leading [K] everywhere, K of them."""

    weight: Tensor | FrozenWeight | FrozenWeights
    """[out, in]."""
    bias: Tensor | None = None
    """[out]."""
    lora_a: Tensor | None = None
    """[r, in]."""
    lora_b: Tensor | None = None
    """[out, r]."""
    scaling: float = 1.0


class Norm(NamedTuple):
    is_rms: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dtype: torch.dtype | None
    """What it computes in; None: in that of its input."""


class Attention(NamedTuple):
    inward: Linear
    outward: Linear
    num_heads: int
    context: int | None
    interleave: bool | None
    """How RoPE pairs channels; None: there is no RoPE."""


class Mlp(NamedTuple):
    inward: Linear
    outward: Linear
    activation: Callable[[Tensor], Tensor]
    is_gated: bool


class Layer(NamedTuple):
    """The weights of a stock layer; the scales are None where it has none."""

    norm1: Norm
    attention: Attention
    scale1: Tensor | None
    norm2: Norm
    mlp: Mlp | None
    """None: something else takes its place."""
    scale2: Tensor | None


# From modules to weights --------------------------------------------------------------------------


def linear_of(module: nn.Module) -> Linear:
    if isinstance(module, LoRALinear):
        frozen, a, b = module.frozen_W, module.lora_A, module.lora_B
        if isinstance(frozen, FrozenLinear):
            return Linear(frozen.frozen_weight, None, a.weight, b.weight, module.scaling)
        return Linear(frozen.weight, frozen.bias, a.weight, b.weight, module.scaling)
    if isinstance(module, FrozenLinear):
        return Linear(module.frozen_weight)
    assert isinstance(module, nn.Linear)
    return Linear(module.weight, module.bias)


def norm_of(module: nn.Module) -> Norm | None:
    if isinstance(module, nn.Identity):
        return None
    if isinstance(module, RMSNorm):
        return Norm(True, module.alpha, None, module.eps, module.dtype)
    assert isinstance(module, nn.LayerNorm)
    dtype = torch.float32 if isinstance(module, LayerNormF32) else None
    return Norm(False, module.weight, module.bias, module.eps, dtype)


def layer_of(module: StreamingTransformerLayer, step: int = 0) -> Layer:
    """The weights of a layer, those of one step where they differ by step."""
    attention, gating, rope = module.self_attn, module.gating, module.self_attn.rope
    if isinstance(gating, nn.ModuleList):
        gating = gating[step]
    mlp = None
    if isinstance(gating, ActivationGating):
        inward, outward = linear_of(gating.linear_in), linear_of(gating.linear_out)
        mlp = Mlp(inward, outward, gating.activation, is_gated=True)
    elif gating is None:
        inward, outward = linear_of(module.linear1), linear_of(module.linear2)
        mlp = Mlp(inward, outward, module.activation, is_gated=False)
    norm1, norm2 = norm_of(module.norm1), norm_of(module.norm2)
    assert norm1 is not None and norm2 is not None
    return Layer(
        norm1,
        Attention(
            linear_of(attention.in_projs[step]),
            linear_of(attention.out_projs[step]),
            attention.num_heads,
            attention.context,
            rope.interleave if rope is not None else None,
        ),
        _scale_of(module.layer_scale_1),
        norm2,
        mlp,
        _scale_of(module.layer_scale_2),
    )


def _scale_of(module: nn.Module) -> Tensor | None:
    return module.scale if isinstance(module, LayerScale) else None


def is_covered(attention: StreamingMultiheadAttention) -> bool:
    """Return whether these functions know this kind of attention; else the stock code must do."""
    return attention.causal and attention.kv_repeat == 1 and not attention.cross_attention


# The mathematics ----------------------------------------------------------------------------------


def stacked(linears: Sequence[Linear]) -> Linear:
    """K linear layers of one shape as one, with a leading [K]; a single one as it is."""
    if len(linears) == 1:
        return linears[0]
    weight, bias, lora_a, lora_b, _ = zip(*linears, strict=True)
    # Frozen weights stay where they are.
    is_frozen = isinstance(weight[0], FrozenWeight)
    weights = FrozenWeights(weight) if is_frozen else torch.stack(weight)
    return Linear(weights, _stack(bias), _stack(lora_a), _stack(lora_b), linears[0].scaling)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)  # type: ignore[arg-type]


def project(x: Tensor, linear: Linear) -> Tensor:
    """[..., in] to [..., out]; with K layers [K, N, in] to [K, N, out].

    The largest product comes last. Where it is the last of a layer, activation checkpointing then
    does not make it again: no gradient needs its result.
    """
    lora = None
    if linear.lora_a is not None and linear.lora_b is not None:
        # Scaled where it is small: at the output it would be another pass, and one backwards.
        lora = _product(_product(x, linear.lora_a) * linear.scaling, linear.lora_b)
    out = _product(x, linear.weight)
    if lora is not None:
        out = out + lora
    if linear.bias is not None:
        bias = linear.bias if linear.bias.dim() == 1 else linear.bias.unsqueeze(1)
        out = out + bias
    return out


def _product(x: Tensor, weight: Tensor | FrozenWeight | FrozenWeights) -> Tensor:
    if isinstance(weight, FrozenWeight):
        return frozen_product(x, weight)
    if isinstance(weight, FrozenWeights):
        return frozen_products(x, weight.each)
    return F.linear(x, weight) if weight.dim() == 2 else torch.bmm(x, weight.transpose(1, 2))


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Over the last dimension, as the stock norms do."""
    wide = x if norm.dtype is None else x.to(norm.dtype)
    if not norm.is_rms:
        return F.layer_norm(wide, wide.shape[-1:], norm.weight, norm.bias, norm.eps).to(x.dtype)
    assert norm.weight is not None
    variance = norm.eps + torch.mean(wide**2, dim=-1, keepdim=True)
    weight = norm.weight.flatten().to(variance)
    return (wide * (weight * torch.rsqrt(variance))).to(x.dtype)


def hidden_of_mlp(x: Tensor, mlp: Mlp) -> Tensor:
    """Return what the outward projection reads."""
    inward = project(x, mlp.inward)
    if not mlp.is_gated:
        return mlp.activation(inward)
    gate, up = inward.chunk(2, dim=-1)
    return mlp.activation(gate) * up


def add(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    return x + (update if scale is None else scale * update)


def _turned_in_compiled_code() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from ttt.ops.moshi.compiled_turned import compiled_turned

    return compiled_turned


def attention_block(x: Tensor, layer: Layer, rope: RopeTable | None) -> Tensor:
    """x + attention(norm1(x)), [B, T, d]."""
    attention = layer.attention
    qkv = project(normalize(x, layer.norm1), attention.inward)
    if attention.interleave is None:
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    else:
        assert rope is not None
        turn = _turned_in_compiled_code() if torch.compiler.is_compiling() else turned
        q, k, v = turn(qkv, attention.num_heads, rope, interleave=attention.interleave)
    mixed = causal_attention(q, k, v, attention.context).flatten(2)
    return add(x, project(mixed, attention.outward), layer.scale1)


def mlp_block(x: Tensor, layer: Layer) -> Tensor:
    """x + mlp(norm2(x)); [B, T, d], or [K, N, C] with weights for every step."""
    assert layer.mlp is not None
    hidden = hidden_of_mlp(normalize(x, layer.norm2), layer.mlp)
    return add(x, project(hidden, layer.mlp.outward), layer.scale2)


def layer_block(x: Tensor, layer: Layer, rope: RopeTable | None) -> Tensor:
    """A whole stock layer, [B, T, d]."""
    return mlp_block(attention_block(x, layer, rope), layer)


def depth_layer_block(x: Tensor, steps: Sequence[Layer]) -> Tensor:
    """A layer of the depth transformer, [K, N, C], with weights for every step.

    Step by step the frames lie together: every step's product is one of large matrices. (With the
    steps of a frame together, as they come, it would be one product for every frame.)
    """
    first = steps[0]
    qkv = normalize(x, first.norm1)
    qkv = project(qkv, stacked([step.attention.inward for step in steps]))
    mixed = depth_attention(qkv, first.attention.num_heads)
    outward = stacked([step.attention.outward for step in steps])
    x = add(x, project(mixed, outward), first.scale1)
    mlps = [step.mlp for step in steps if step.mlp is not None]
    mlp = Mlp(
        stacked([mlp.inward for mlp in mlps]),
        stacked([mlp.outward for mlp in mlps]),
        mlps[0].activation,
        mlps[0].is_gated,
    )
    return mlp_block(x, first._replace(mlp=mlp))


def depth_input_block(x: Tensor, tokens: Tensor, linears: Sequence[Linear]) -> Tensor:
    """Return what the depth transformer reads at each step, [K, N, C].

    Args:
        x: [N, d], the main transformer's output.
        tokens: [K, N, C], embeddings of the codes of the steps before.
        linears: [C, d], for every step or one for all.
    """
    if len(linears) == 1:
        return project(x, linears[0]) + tokens

    def by_step(weights: Sequence[Tensor]) -> Tensor:
        # x is the same for all steps: one product, of which each step has some columns.
        product = F.linear(x, torch.cat(list(weights)))
        return product.unflatten(-1, (len(weights), -1)).transpose(0, 1)

    weight, _, lora_a, lora_b, scaling = zip(*linears, strict=True)
    out = by_step(weight)
    if lora_a[0] is not None:
        out = out + _product(by_step(lora_a) * scaling[0], torch.stack(lora_b))
    return out + tokens
