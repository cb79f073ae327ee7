"""What a run leaves on disk, and continues from."""

from finetune.checkpoint.random_state import get_random_state, set_random_state
from finetune.checkpoint.run_dir import (
    created_run_dir,
    fill_shards,
    list_checkpoints,
    load_resume_state,
    load_trained_weights,
    open_run_dir,
    step_of,
)
from finetune.checkpoint.run_lock import RunLock
from finetune.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "RunLock",
    "created_run_dir",
    "fill_shards",
    "get_random_state",
    "list_checkpoints",
    "load_resume_state",
    "load_trained_weights",
    "open_run_dir",
    "set_random_state",
    "step_of",
]
