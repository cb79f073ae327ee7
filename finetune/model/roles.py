"""This module decides what trains: every parameter has a role, and a run trains some roles."""

from moshi.models.lm_utils import ScaledEmbedding
from moshi.modules.lora import LoRALinear
from torch import nn

from finetune.config import TrainArgs
from ttt import TTTLMModel, ttt_parameters
from ttt.layers.frozen import num_frozen


def training_roles(args: TrainArgs) -> set[str]:
    """Return the roles whose parameters a run of this configuration trains."""
    if args.full_finetuning:
        return {"base", "embedding", "ttt"}
    if args.lora.enable:
        return {"lora", "ttt"} | ({"embedding"} if args.lora.ft_embed else set())
    return {"ttt"}


def parameters_by_role(model: TTTLMModel) -> dict[str, dict[str, nn.Parameter]]:
    """Return all parameters by role and name; the role follows from the module that holds them.

    Roles: "ttt" (TTT's own), "lora" (adapters), "embedding", and "base" (all else). Roles without
    parameters are left out.
    """
    own = ttt_parameters(model)
    lora, embeddings = set(), set()
    for prefix, module in model.named_modules():
        if isinstance(module, LoRALinear):
            lora |= {f"{prefix}.{part}.weight" for part in ("lora_A", "lora_B")}
        elif isinstance(module, ScaledEmbedding):
            embeddings |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    roles: dict[str, dict[str, nn.Parameter]] = {"base": {}, "embedding": {}, "lora": {}, "ttt": {}}
    for name, parameter in model.named_parameters():
        if name in own:
            role = "ttt"
        elif name in lora:
            role = "lora"
        elif name in embeddings:
            role = "embedding"
        else:
            role = "base"
        roles[role][name] = parameter
    return {role: named for role, named in roles.items() if named}


def count_by_role(model: TTTLMModel) -> dict[str, tuple[int, int]]:
    """Return the number of weights of each role, and how many of them train."""
    counts = {
        role: (
            sum(p.numel() for p in named.values()),
            sum(p.numel() for p in named.values() if p.requires_grad),
        )
        for role, named in parameters_by_role(model).items()
    }
    total, trained = counts["base"]
    return counts | {"base": (total + num_frozen(model), trained)}


def trainable_by_role(model: TTTLMModel) -> dict[str, dict[str, nn.Parameter]]:
    """Return `parameters_by_role`, of those alone that train."""
    trainable = {
        role: {name: p for name, p in named.items() if p.requires_grad}
        for role, named in parameters_by_role(model).items()
    }
    return {role: named for role, named in trainable.items() if named}
