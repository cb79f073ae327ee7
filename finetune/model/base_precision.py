"""The frozen base of a model in fewer bits than its parameters: `base_precision`."""

import importlib.util

import torch
from torch import nn

from finetune.errors import UserError
from ttt import TTTLMModel
from ttt.layers.frozen import freeze_linears, frozen_linears
from ttt.ops.frozen.float8 import MULTIPLE

LEAST_CAPABILITY = (8, 9)
"""Of a GPU that multiplies in e4m3: Ada and Hopper."""


def freeze_base(model: TTTLMModel, precision: str) -> None:
    """Keep the linear layers of both transformers as `precision` says; the model is on `meta`, or
    has its weights.

    What stays as it is: embeddings, norms, LoRA and TTT's own parameters, which are small or train;
    the heads, whose rounding would go into the loss at once; and what a TTT method asks for.
    """
    if precision == "bfloat16":
        return
    skip: set[nn.Module] = set()
    for layer in model.ttt_layers.values():
        skip |= layer.kept_linears()
    for transformer in (model.transformer, model.depformer):
        if transformer is not None:
            freeze_linears(transformer, precision, skip=skip)


def require_bitsandbytes(what: str) -> None:
    """
    Raises:
        UserError: the package is not here; `what`, a key and its value, needs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{what} needs the package bitsandbytes, which is not installed here; install it (pip "
            f"install bitsandbytes), or choose another value."
        )


def require_precision(precision: str, device: torch.device) -> None:
    """
    Raises:
        UserError: this machine cannot compute with such weights.
    """
    if precision == "nf4":
        require_bitsandbytes("base_precision: nf4")
    if precision != "float8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise UserError(
            f"base_precision: float8 needs a GPU that multiplies in 8 bits (compute capability "
            f"{'.'.join(map(str, LEAST_CAPABILITY))} or later: Ada, Hopper), and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}; choose "
            f"nf4 or bfloat16."
        )


def require_widths(model: TTTLMModel, precision: str, device: torch.device) -> None:
    """
    Raises:
        UserError: the model does not suit such weights.
    """
    if precision != "float8" or device.type != "cuda":
        return
    for name, layer in frozen_linears(model):
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise UserError(
                f"base_precision: float8 needs widths that are multiples of {MULTIPLE}, and "
                f"{name.removesuffix('.frozen_W')} is {layer.out_features} x {layer.in_features}; "
                f"choose nf4 or bfloat16."
            )
