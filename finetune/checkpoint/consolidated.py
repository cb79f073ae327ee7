"""The weights of a checkpoint for people (`consolidated/`), in the layout of stock `moshi`."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from moshi.models import loaders
from moshi.modules.lora import LoRALinear
from torch import Tensor

from finetune.config import TrainArgs
from finetune.distributed import whole
from finetune.model import changed_shape, parameters_by_role
from finetune.safety import stays_inside
from ttt import TTTLMModel, ttt_parameters
from ttt.layers.frozen import frozen_linears


def consolidated(
    args: TrainArgs, model: TTTLMModel, adapter_roles: Collection[str]
) -> dict[str, Iterator[tuple[str, Tensor]]]:
    """The weights for people, file by file: what trained, under the names of stock `moshi`.

    The tensors are gathered as they are asked for; all processes must ask for all.

    Args:
        adapter_roles: see `finetune.model.adapter_roles`.
    """
    dtype = getattr(torch, args.param_dtype)
    files: dict[str, Iterator[tuple[str, Tensor]]] = {}
    if adapter_roles:
        files["lora.safetensors"] = (
            (name, whole(parameter, dtype))
            for role, named in parameters_by_role(model).items()
            if role in adapter_roles
            for name, parameter in named.items()
        )
    elif args.lora.enable or args.full_finetuning:
        files["consolidated.safetensors"] = merged_weights(model, dtype)
    if args.ttt.enabled:
        files["ttt.safetensors"] = (
            (name, whole(parameter, dtype)) for name, parameter in ttt_parameters(model).items()
        )
    return files


def merged_weights(model: TTTLMModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of the stock model, LoRA merged, without TTT's own; one after
    the other, as a second copy of all may not fit beside the first. Of a sharded model all
    processes must ask for all of them."""
    adapters = {
        prefix: module for prefix, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    own = ttt_parameters(model)
    for name, weight in _full_weights(model, dtype):
        prefix, _, part = name.rpartition(".")
        owner, _, inner = prefix.rpartition(".")
        if name in own or (owner in adapters and inner in ("lora_A", "lora_B")):
            continue
        if owner in adapters and inner == "frozen_W":
            down, up = adapters[owner].lora_A.weight, adapters[owner].lora_B.weight
            change = whole(up, dtype).mm(whole(down, dtype)) * adapters[owner].scaling
            yield f"{owner}.{part}", change + whole(weight, dtype)
        else:
            yield name, whole(weight, dtype)


def _full_weights(model: TTTLMModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The parameters, and in their type what is kept in fewer bits."""
    yield from model.named_parameters()
    for prefix, layer in frozen_linears(model):
        yield f"{prefix}.weight", layer.thawed(dtype)


def consolidated_texts(args: TrainArgs, info: loaders.CheckpointInfo) -> dict[str, dict[str, Any]]:
    """The JSON files beside them: config.json, and Mimi's shape under the name that it has there.

    The large files that config.json names, Mimi's weights and the tokenizer, are with the base.
    """
    config = _config(args, info)
    texts = {}
    name = config.get("mimi_config_name")
    # Of a base whose files were named one by one, nobody has looked at this name.
    if isinstance(name, str) and name.endswith(".json") and stays_inside(name):
        assert info.mimi_config is not None
        texts[name] = info.mimi_config
    return texts | {"config.json": config}


def _config(args: TrainArgs, info: loaders.CheckpointInfo) -> dict[str, Any]:
    adapters_only = args.lora.enable and args.save_adapters
    config = changed_shape(
        loaders._lm_kwargs if info.raw_config is None else info.raw_config, args.model
    )
    config["lora"] = adapters_only
    if args.model.attention_context is not None:
        config["context"] = args.model.attention_context
    if adapters_only:
        config |= {"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling}
    elif args.lora.enable or args.full_finetuning:
        config["moshi_name"] = "consolidated.safetensors"
    return config
