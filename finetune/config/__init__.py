"""What a run can be told: its options, how they are read and checked, and their page in docs."""

from finetune.config.args import (
    LoraArgs,
    ModelArgs,
    ModelPaths,
    OptimArgs,
    ParallelArgs,
    TrainArgs,
    WandbArgs,
)
from finetune.config.checks import Problem
from finetune.config.data_args import DataArgs
from finetune.config.option_values import (
    choices,
    flag,
    items,
    number,
    one_of,
    refuse,
    require,
    whole_number,
    whole_numbers,
)
from finetune.config.read import (
    NULLS,
    changed_keys,
    check_config,
    flatten,
    list_problems,
    load_config,
    load_run_config,
    public_dict,
    read_yaml,
    save_config,
)

__all__ = [
    "NULLS",
    "DataArgs",
    "LoraArgs",
    "ModelArgs",
    "ModelPaths",
    "OptimArgs",
    "ParallelArgs",
    "Problem",
    "TrainArgs",
    "WandbArgs",
    "changed_keys",
    "check_config",
    "choices",
    "flag",
    "flatten",
    "items",
    "list_problems",
    "load_config",
    "load_run_config",
    "number",
    "one_of",
    "public_dict",
    "read_yaml",
    "refuse",
    "require",
    "save_config",
    "whole_number",
    "whole_numbers",
]
