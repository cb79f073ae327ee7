"""This package keeps what a run leaves on disk and continues from."""

from finetune.checkpoint.consolidated import merged_weights
from finetune.checkpoint.earlier_parts import (
    OF_FROZEN_WEIGHTS,
    Part,
    earlier_parts_of,
    parts_before,
)
from finetune.checkpoint.next_commands import next_commands
from finetune.checkpoint.resume_file import frozen_fingerprint_of
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
    frozen_base,
    holds_something,
    require_own_folder,
    require_same_parameters,
)
from finetune.checkpoint.run_record import replaced_run, run_wrote
from finetune.checkpoint.snapshot import CheckpointBytes, checkpoint_bytes
from finetune.checkpoint.soundness import (
    require_own_base,
    require_sound,
    require_sound_start,
    seal,
)
from finetune.checkpoint.writer import CheckpointWriter
from finetune.kept import step_of

__all__ = [
    "OF_FROZEN_WEIGHTS",
    "CheckpointBytes",
    "CheckpointWriter",
    "Part",
    "RunFolder",
    "cautions_of_resuming",
    "checkpoint_bytes",
    "earlier_parts_of",
    "eval_loss_of",
    "fill_shards",
    "first_whole",
    "free_run_dir",
    "frozen_base",
    "frozen_fingerprint_of",
    "holds_something",
    "list_checkpoints",
    "load_resume_state",
    "load_trained_weights",
    "merged_weights",
    "next_commands",
    "parts_before",
    "replaced_run",
    "require_own_base",
    "require_own_folder",
    "require_same_parameters",
    "require_sound",
    "require_sound_start",
    "run_wrote",
    "seal",
    "step_of",
]
