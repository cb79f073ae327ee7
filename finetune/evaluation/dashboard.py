"""An evaluation's results in Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from finetune.evaluation.options import Options
from finetune.evaluation.tasks import TASKS
from finetune.monitoring import open_wandb


def scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """Single numbers of the results by name, for a dashboard."""
    found = {
        f"{name}/{key}": value
        for name, task in TASKS.items()
        if name in results
        for key, value in task.scalars(results[name]).items()
    }
    return {name: value for name, value in found.items() if value is not None}


def to_wandb(options: Options, results: Mapping[str, Any], page: str) -> None:
    config = {"evaluation": dict(results["options"]), "model": results["model"]}
    run = open_wandb(options.out, options.wandb, config, resumed=False, keeps_id=False)
    import wandb

    run.log({**scalars(results), "report": wandb.Html(page, inject=False)})
    run.finish()
