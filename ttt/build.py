"""Builds Moshi with TTT from its shape."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ttt.config import TTTArgs
from ttt.layers import Place, layer_class
from ttt.layers.depth import DepthLayer
from ttt.layers.execution import Checkpointing, Execution
from ttt.model import TTTLMModel, TTTTransformerLayer
from ttt.registry import METHODS

logger = logging.getLogger(__name__)


def build_model(
    lm_kwargs: Mapping[str, Any],
    ttt_args: TTTArgs,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: Checkpointing = False,
    selective_layers: int = 0,
    compile: bool = False,
    attention_context: int | None = None,
) -> TTTLMModel:
    """A Moshi with random weights and TTT in the configured layers, in training mode.

    Untrained TTT changes nothing: the outputs are those of the stock model with the same weights.

    Args:
        lm_kwargs: what stock `LMModel` takes; for Moshi 7B, `moshi.models.loaders._lm_kwargs`.
        ttt_args: with `enabled: false` the model has no TTT layers.
        device: `meta` to load weights later.
        dtype: of the parameters.
        gradient_checkpointing: what to keep for the backward pass; see `Checkpointing`.
        selective_layers: how many of the main transformer's layers keep what `selective` does where
            the others keep their inputs alone; those with TTT at last.
        compile: the layers in training. It changes nothing but time and rounding.
        attention_context: frames that attention sees, instead of the `context` in `lm_kwargs`; in
            the TTT layers `ttt_args.attention_context` replaces both.

    Raises:
        ValueError: an option out of range, no layer to put TTT in, a layer without a gated MLP,
            more `selective_layers` than there are, or an odd head width with RoPE.
    """
    lm_kwargs = dict(lm_kwargs)
    if attention_context is not None:
        if attention_context < 1:
            raise ValueError(f"attention_context: must be at least 1, got {attention_context}")
        lm_kwargs["context"] = attention_context
    if not isinstance(gradient_checkpointing, bool) and gradient_checkpointing != "selective":
        raise ValueError(
            "gradient_checkpointing: must be false, true or selective, got "
            f"{gradient_checkpointing!r}"
        )
    _refuse(lm_kwargs, ttt_args, selective_layers)
    without_values = device is not None and torch.device(device).type == "meta"
    with _NothingDrawn() if without_values else nullcontext():
        model = TTTLMModel(
            device=device,
            dtype=dtype,
            layer_class=TTTTransformerLayer,
            depformer_layer_class=DepthLayer,
            **lm_kwargs,
        )
    model.ttt_args = ttt_args
    norm = lm_kwargs.get("norm", "layer_norm")
    indices = ttt_args.layers(lm_kwargs["num_layers"])
    replaces_mlp = METHODS[ttt_args.method].replaces_mlp
    for index in indices:
        block = model.transformer.layers[index]
        place = Place(block, model.dim, block.self_attn.num_heads, norm, device, dtype)
        layer = layer_class(ttt_args.method)(place, ttt_args)
        if replaces_mlp:
            block.gating = layer
        else:
            block.ttt = layer
    assert list(model.ttt_layers) == indices
    _set_execution(model, Execution(gradient_checkpointing, compile), selective_layers)
    _set_attention_context(model, ttt_args)
    # Every layer says the same.
    for remark in dict.fromkeys(r for m in model.ttt_layers.values() for r in m.remarks()):
        logger.info(remark)
    return model


def _refuse(lm_kwargs: Mapping[str, Any], ttt_args: TTTArgs, selective_layers: int) -> None:
    """
    Raises:
        ValueError: no model can be built so.
    """
    problems = ttt_args.problems()
    if problems:
        raise ValueError("; ".join(f"ttt.{name}: {problem}" for name, problem in problems))
    has_layers = bool(ttt_args.layers(lm_kwargs["num_layers"]))
    replaces_mlp = METHODS[ttt_args.method].replaces_mlp
    if has_layers and replaces_mlp and lm_kwargs.get("gating", "none") == "none":
        raise ValueError(
            f"ttt.method: {ttt_args.method} needs gated MLPs, and this model has none "
            "(gating: none)."
        )
    if lm_kwargs.get("cross_attention") or lm_kwargs.get("fuser") is not None:
        raise ValueError(
            "models with conditioning (cross attention or a fuser, as Hibiki has) are not "
            "supported; use a Moshi without it."
        )
    if not 0 <= selective_layers <= lm_kwargs["num_layers"]:
        raise ValueError(
            f"selective_layers: must lie between 0 and the model's {lm_kwargs['num_layers']} "
            f"layers, got {selective_layers}"
        )


class _NothingDrawn(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with random numbers.

    Tensors on `meta` have no values, and PyTorch takes 2 ms to draw those of one: most of the time
    that a Moshi 7B takes to build there, and with its imports nearly all that a small one takes.
    """

    DRAW = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAW:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _set_execution(model: TTTLMModel, execution: Execution, selective_layers: int) -> None:
    """Tell each layer what it keeps for the backward pass."""
    model.execution = execution
    selective = dataclasses.replace(execution, checkpointing="selective")
    chosen = set(model.order_of_keeping[:selective_layers])
    for index, block in enumerate(model.transformer.layers):
        block.execution = selective if index in chosen else execution
        if block.ttt_module is not None:
            block.ttt_module.execution = block.execution


def _set_attention_context(model: TTTLMModel, args: TTTArgs) -> None:
    """Set the attention's context in the TTT layers, or those that would be: a control run with
    `enabled: false` must see as much as the run that it is compared with. The KV cache of streaming
    follows, as it asks the attention."""
    if args.attention_context is None:
        return
    layers = model.transformer.layers
    chosen = layers[args.start_layer :: args.layer_frequency]
    for layer in chosen:
        layer.self_attn.context = args.attention_context
    assert len(chosen) == len(model.ttt_layers) or not args.enabled
    logger.info(
        "attention sees %d frames in the %d layers of ttt.start_layer and ttt.layer_frequency, "
        "and %s in the %d others",
        args.attention_context,
        len(chosen),
        model.context,
        len(layers) - len(chosen),
    )
