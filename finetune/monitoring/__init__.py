"""This package shows a person a run: log, metrics, curves, times, and what TTT does."""

from finetune.monitoring.console import (
    Progress,
    console,
    describe,
    format_count,
    format_duration,
    setup_logging,
)
from finetune.monitoring.metrics import (
    KINDS,
    Kind,
    MetricsLogger,
    metrics_path,
    open_wandb,
    read_metrics,
)
from finetune.monitoring.phases import Phases, StepProfiler
from finetune.monitoring.plots import plot_losses, running_mean, series
from finetune.monitoring.run_log import RunLog
from finetune.monitoring.ttt_effect import EffectWatch

__all__ = [
    "KINDS",
    "EffectWatch",
    "Kind",
    "MetricsLogger",
    "Phases",
    "Progress",
    "RunLog",
    "StepProfiler",
    "console",
    "describe",
    "format_count",
    "format_duration",
    "metrics_path",
    "open_wandb",
    "plot_losses",
    "read_metrics",
    "running_mean",
    "series",
    "setup_logging",
]
