"""An evaluation's results in Weights & Biases."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.monitoring import open_wandb

from .options import Options


def scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """Single numbers of the results by name, for a dashboard."""
    found: dict[str, Any] = {}
    position = results.get("position", {})
    compared = [("-".join(d["arms"]), d) for d in position.get("differences", [])]
    for name, of_stream in [*position.get("arms", {}).items(), *compared]:
        for stream in position["guessing"]:
            for place in ("mean", "beyond_window"):
                found[f"position/{name}/{stream}/{place}"] = of_stream[stream][place]["value"]
    if "pairs" in results:
        groups: Sequence[tuple[str, Any]] = [*results["pairs"]["groups"].items()]
        for name, group in [("all", results["pairs"]["all"]), *groups]:
            found[f"pairs/{name}/accuracy"] = group["accuracy"]["value"]
    for name, of in results.get("health", {}).get("measures", {}).items():
        found[f"health/{name}"] = of["generated"]["value"]
    return {name: value for name, value in found.items() if value is not None}


def to_wandb(options: Options, results: Mapping[str, Any], page: str) -> None:
    config = {"evaluation": dict(results["options"]), "model": results["model"]}
    run = open_wandb(options.out, options.wandb, config, resumed=False)
    import wandb

    run.log({**scalars(results), "report": wandb.Html(page, inject=False)})
    run.finish()
