"""This package holds what a run can be told: options, their reading and checking, their pages in
docs."""

from finetune.config.args import (
    LoraArgs,
    ModelArgs,
    ModelPaths,
    OptimArgs,
    ParallelArgs,
    Precision,
    Seed,
    Size,
    TrainArgs,
    WandbArgs,
)
from finetune.config.checks import changed_meaning
from finetune.config.command_options import (
    CompletionOptions,
    EncodeOptions,
    InitOptions,
    KeyOptions,
    PlanOptions,
    PlotOptions,
    TrainOptions,
)
from finetune.config.completion import completion_script
from finetune.config.data_args import DataArgs
from finetune.config.docs_page import help_page, pages
from finetune.config.explain import explain
from finetune.config.fields import Problem, fill, keys_that
from finetune.config.marks import POSITIONAL, Prefix
from finetune.config.moshi_finetune import changed_since_moshi_finetune
from finetune.config.must_exist import (
    CHECKPOINT,
    CONFIGURATION,
    DATA,
    FILE,
    FILE_OR_FOLDER,
    FOLDER,
    REPOSITORY,
    SOURCE,
    SOURCES,
    is_configuration,
    require_file,
)
from finetune.config.options import BARE, ask_for_missing, read_options, require_there
from finetune.config.read import (
    Checked,
    changed_keys,
    check_config,
    flatten,
    list_problems,
    load_config,
    load_run_config,
    missing_inputs,
    public_dict,
    read_yaml,
    require_configuration,
    save_config,
)
from finetune.config.sources import parse_sources, require_sources, resolved_sources
from finetune.config.values import NULLS, FilePath, PathsText, PathText, parse

__all__ = [
    "BARE",
    "CHECKPOINT",
    "CONFIGURATION",
    "DATA",
    "FILE",
    "FILE_OR_FOLDER",
    "FOLDER",
    "NULLS",
    "POSITIONAL",
    "REPOSITORY",
    "SOURCE",
    "SOURCES",
    "Checked",
    "CompletionOptions",
    "DataArgs",
    "EncodeOptions",
    "FilePath",
    "InitOptions",
    "KeyOptions",
    "LoraArgs",
    "ModelArgs",
    "ModelPaths",
    "OptimArgs",
    "ParallelArgs",
    "PathText",
    "PathsText",
    "PlanOptions",
    "PlotOptions",
    "Precision",
    "Prefix",
    "Problem",
    "Seed",
    "Size",
    "TrainArgs",
    "TrainOptions",
    "WandbArgs",
    "ask_for_missing",
    "changed_keys",
    "changed_meaning",
    "changed_since_moshi_finetune",
    "check_config",
    "completion_script",
    "explain",
    "fill",
    "flatten",
    "help_page",
    "is_configuration",
    "keys_that",
    "list_problems",
    "load_config",
    "load_run_config",
    "missing_inputs",
    "pages",
    "parse",
    "parse_sources",
    "public_dict",
    "read_options",
    "read_yaml",
    "require_configuration",
    "require_file",
    "require_sources",
    "require_there",
    "resolved_sources",
    "save_config",
]
