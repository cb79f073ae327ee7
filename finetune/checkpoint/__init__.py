"""This package keeps what a run leaves on disk and continues from."""

from finetune.checkpoint.consolidated import merged_weights
from finetune.checkpoint.random_state import get_random_state, set_random_state
from finetune.checkpoint.run_dir import (
    eval_loss_of,
    fill_shards,
    first_whole,
    list_checkpoints,
    load_resume_state,
    load_trained_weights,
)
from finetune.checkpoint.run_folder import (
    RunFolder,
    cautions_of_resuming,
    free_run_dir,
    holds_something,
    require_same_parameters,
)
from finetune.checkpoint.run_record import replaced_run, run_wrote
from finetune.checkpoint.writer import CheckpointWriter, snapshot_bytes
from finetune.kept import step_of

__all__ = [
    "CheckpointWriter",
    "RunFolder",
    "cautions_of_resuming",
    "eval_loss_of",
    "fill_shards",
    "first_whole",
    "free_run_dir",
    "get_random_state",
    "holds_something",
    "list_checkpoints",
    "load_resume_state",
    "load_trained_weights",
    "merged_weights",
    "replaced_run",
    "require_same_parameters",
    "run_wrote",
    "set_random_state",
    "snapshot_bytes",
    "step_of",
]
