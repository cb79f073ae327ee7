"""This package makes a model with its weights from a configuration."""

from finetune.model.adapters import ALL_WEIGHTS
from finetune.model.base_precision import freeze_base
from finetune.model.build import (
    add_lora,
    build_codec,
    changed_shape,
    frozen_fingerprint,
    load_model,
    model_shape,
    plan_model,
    require_machine,
)
from finetune.model.exported import TTT_FILE, exported_ttt_args, unused_ttt
from finetune.model.find import find_checkpoint, find_recorded
from finetune.model.hub import HUB_ERRORS, shape_from_hub
from finetune.model.init_from import (
    adapter_roles,
    base_weights,
    misfits,
    open_earlier_run,
)
from finetune.model.read_codes import read_codes_of
from finetune.model.roles import count_by_role, parameters_by_role, trainable_by_role

__all__ = [
    "ALL_WEIGHTS",
    "HUB_ERRORS",
    "TTT_FILE",
    "adapter_roles",
    "add_lora",
    "base_weights",
    "build_codec",
    "changed_shape",
    "count_by_role",
    "exported_ttt_args",
    "find_checkpoint",
    "find_recorded",
    "freeze_base",
    "frozen_fingerprint",
    "load_model",
    "misfits",
    "model_shape",
    "open_earlier_run",
    "parameters_by_role",
    "plan_model",
    "read_codes_of",
    "require_machine",
    "shape_from_hub",
    "trainable_by_role",
    "unused_ttt",
]
