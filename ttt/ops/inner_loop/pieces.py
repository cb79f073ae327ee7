"""The pieces of all forms of TTT-Linear and TTT-MLP: f_W, what frames write, how they are read.

`ttt_linear_mlp` says what they compute; B, H, T, K and f are as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Of the layer norm inside the loop."""

BLOCK = 64
"""M, the frames that the kernels of TTT-MLP take at once, of whole mini-batches."""

InnerLayers = tuple[tuple[Tensor, Tensor], ...]
"""The fast weights of f_W, layer by layer: W [B, H, in, out] and b [B, H, out]."""

Written = tuple[tuple[Tensor, Tensor], ...]
"""What frames write, layer by layer: inputs x [B, H, K, in] and errors eta · g [B, H, K, out]."""


def memory(
    like: Tensor, *shape: int, exists: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """Return memory of a shape; or what has that shape and takes none, for activation checkpointing
    to find as the second forward pass will have it."""
    if exists:
        return like.new_empty(shape, dtype=dtype)
    return like.new_empty(1, dtype=dtype).expand(shape)


def flatten(layers: InnerLayers) -> tuple[Tensor, ...]:
    """((w1, b1), …) as (w1, b1, …), as the operators take and give them; `Written` likewise."""
    return tuple(x for pair in layers for x in pair)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply to every head a layer norm of its own. x: [B, H, T, f]; weight, bias: [H, f]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
    return normed * weight.unsqueeze(-2) + bias.unsqueeze(-2)


def inner_forward(layers: InnerLayers, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """f_W(x): the inputs [B, H, T, in] and the outputs [B, H, T, out] of each linear layer."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for index, (w, b) in enumerate(layers):
        inputs.append(x if index == 0 else F.gelu(outputs[-1], approximate="tanh"))
        outputs.append(inputs[-1] @ w + b.unsqueeze(-2))
    return inputs, outputs


def inner_errors(
    layers: InnerLayers, k: Tensor, v: Tensor, eta: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> Written:
    """Return what frames write, by the weights of their mini-batch's start. Shapes: see
    `ttt_linear`."""
    inputs, outputs = inner_forward(layers, k)
    gradient = _reconstruction_gradient(outputs[-1], v - k, ln_weight, ln_bias)
    errors = [eta.unsqueeze(-1) * gradient]
    for index in range(len(layers) - 1, 0, -1):
        back = errors[0] @ layers[index][0].transpose(-1, -2)
        errors.insert(0, torch.ops.aten.gelu_backward(back, outputs[index - 1], approximate="tanh"))
    return tuple(zip(inputs, errors, strict=True))


def inner_read(layers: InnerLayers, written: Written, q: Tensor, scale: Tensor) -> Tensor:
    """f of the query, before the layer norm, with the steps that are taken by then: [B, H, T, f].

    Args:
        layers: the weights at the mini-batch's start.
        written: of the mini-batch's frames s; see `inner_errors`.
        q: [B, H, T, f], of frames t.
        scale: broadcasts to [B, H, T, S]: token_scale[t] where s is t or earlier, else 0.
    """
    out = q
    for index, ((w, b), (x, errors)) in enumerate(zip(layers, written, strict=True)):
        if index > 0:
            out = F.gelu(out, approximate="tanh")
        steps = (out @ x.transpose(-1, -2) + 1) * scale
        out = out @ w + b.unsqueeze(-2) - steps @ errors
    return out


def inner_write(layers: InnerLayers, written: Written, scale: Tensor) -> InnerLayers:
    """The weights after a mini-batch.

    Args:
        scale: broadcasts to [B, H, K, f]: token_scale[K − 1], or 0 where nothing is to be written.
    """
    updated = []
    for (w, b), (x, errors) in zip(layers, written, strict=True):
        step = scale * errors
        updated.append((w - x.transpose(-1, -2) @ step, b - step.sum(-2)))
    return tuple(updated)


def _reconstruction_gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """∂/∂z of ½ ‖LN(z) − target‖²; z, target: [B, H, K, f], weight, bias: [H, f]."""
    variance, mean = torch.var_mean(z, dim=-1, keepdim=True, correction=0)
    rstd = torch.rsqrt(variance + EPSILON)
    normed = (z - mean) * rstd
    weight = weight.unsqueeze(-2)
    g = (normed * weight + bias.unsqueeze(-2) - target) * weight
    return (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * rstd
