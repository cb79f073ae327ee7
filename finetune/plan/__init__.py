"""This package says what a run takes, before it starts and as it starts."""

from finetune.plan.describe import SUMMARY, describe_run, write_summary
from finetune.plan.memory import estimate, explained
from finetune.plan.plan import plan
from finetune.plan.room import require_room
from finetune.plan.starter import Wanted, write_config
from finetune.plan.table import table

__all__ = [
    "SUMMARY",
    "Wanted",
    "describe_run",
    "estimate",
    "explained",
    "plan",
    "require_room",
    "table",
    "write_config",
    "write_summary",
]
