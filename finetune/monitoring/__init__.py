"""This package shows a person a run: log, metrics, curves, times, and what TTT does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finetune.monitoring.console import (
    Progress,
    console,
    counting,
    describe,
    format_count,
    format_duration,
    setup_logging,
)

if TYPE_CHECKING:
    from finetune.monitoring.kinds import KINDS, Kind
    from finetune.monitoring.metrics import MetricsLogger, metrics_path, read_metrics
    from finetune.monitoring.phases import Phases, StepProfiler
    from finetune.monitoring.plots import plot_losses, running_mean, series
    from finetune.monitoring.run_log import RunLog
    from finetune.monitoring.ttt_effect import EffectWatch
    from finetune.monitoring.wandb_run import open_wandb, require_wandb

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
    "counting",
    "describe",
    "format_count",
    "format_duration",
    "metrics_path",
    "open_wandb",
    "plot_losses",
    "read_metrics",
    "require_wandb",
    "running_mean",
    "series",
    "setup_logging",
]

_MODULES = {
    **dict.fromkeys(("KINDS", "Kind"), "kinds"),
    **dict.fromkeys(("MetricsLogger", "metrics_path", "read_metrics"), "metrics"),
    **dict.fromkeys(("open_wandb", "require_wandb"), "wandb_run"),
    **dict.fromkeys(("Phases", "StepProfiler"), "phases"),
    **dict.fromkeys(("plot_losses", "running_mean", "series"), "plots"),
    "RunLog": "run_log",
    "EffectWatch": "ttt_effect",
}


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"finetune.monitoring.{_MODULES[name]}"), name)
