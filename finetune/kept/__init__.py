"""This package keeps what is done already on the disk, so that no work is done twice."""

from finetune.kept.checkpoint_folders import is_stock, require_checkpoint, require_part
from finetune.kept.checkpoint_names import CHECKPOINT_NAME, DIVERGED, checkpoints_in, step_of
from finetune.kept.folders import make_folder, without_empty_folders
from finetune.kept.lock import FileLock, held_folder
from finetune.kept.outputs import MARK, Output, is_png, mark_of, require_not_read, require_outputs
from finetune.kept.records import Records, fingerprint_of, read_records
from finetune.kept.wav import WavWriter, write_wav
from finetune.kept.whole import (
    Kept,
    is_free_folder,
    name_when_whole,
    refuse_to_replace,
    require_free_folder,
    require_new_file,
    require_room,
    require_writable,
    whole_folder,
    write_whole,
    writing,
)

__all__ = [
    "CHECKPOINT_NAME",
    "DIVERGED",
    "MARK",
    "FileLock",
    "Kept",
    "Output",
    "Records",
    "WavWriter",
    "checkpoints_in",
    "fingerprint_of",
    "held_folder",
    "is_free_folder",
    "is_png",
    "is_stock",
    "make_folder",
    "mark_of",
    "name_when_whole",
    "read_records",
    "refuse_to_replace",
    "require_checkpoint",
    "require_free_folder",
    "require_new_file",
    "require_not_read",
    "require_outputs",
    "require_part",
    "require_room",
    "require_writable",
    "step_of",
    "whole_folder",
    "without_empty_folders",
    "write_wav",
    "write_whole",
    "writing",
]
