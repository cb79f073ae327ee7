"""This package makes a model with its weights from a configuration."""

from finetune.model.base_precision import freeze_base
from finetune.model.build import (
    add_lora,
    base_weights,
    build_codec,
    changed_shape,
    find_checkpoint,
    load_model,
    model_shape,
    plan_model,
)
from finetune.model.hub import HUB_ERRORS, shape_from_hub
from finetune.model.init_from import (
    adapter_roles,
    misfits,
    open_earlier_run,
)
from finetune.model.roles import count_by_role, parameters_by_role, trainable_by_role

__all__ = [
    "HUB_ERRORS",
    "adapter_roles",
    "add_lora",
    "base_weights",
    "build_codec",
    "changed_shape",
    "count_by_role",
    "find_checkpoint",
    "freeze_base",
    "load_model",
    "misfits",
    "model_shape",
    "open_earlier_run",
    "parameters_by_role",
    "plan_model",
    "shape_from_hub",
    "trainable_by_role",
]
