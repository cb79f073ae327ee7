"""This package says what a run takes, before it starts and as it starts."""

from finetune.plan.command import planned
from finetune.plan.describe import SUMMARY, describe_run, write_summary
from finetune.plan.memory import estimate, explained
from finetune.plan.plan import plan
from finetune.plan.room import require_room
from finetune.plan.starter import recording_lengths, write_config
from finetune.plan.starter_yaml import Wanted
from finetune.plan.table import table
from finetune.plan.ttt_updates import caution_of_updates, num_learning

__all__ = [
    "SUMMARY",
    "Wanted",
    "caution_of_updates",
    "describe_run",
    "estimate",
    "explained",
    "num_learning",
    "plan",
    "planned",
    "recording_lengths",
    "require_room",
    "table",
    "write_config",
    "write_summary",
]
