"""The weights that a run starts from: Moshi's, or those of an earlier run or exported model.

An earlier run has them in up to three parts: the base (its own, if all weights trained or LoRA was
merged; else the one that it started from), LoRA adapters, and TTT's parameters. So has an exported
model; the base of adapters alone is the one of the run that starts from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import (
    ModelPaths,
    Problem,
    TrainArgs,
    changed_meaning,
    list_problems,
    load_run_config,
)
from finetune.errors import UserError
from finetune.kept import is_stock, require_checkpoint, require_part
from finetune.model.exported import exported_args, exported_weights
from finetune.model.find import find_checkpoint, find_recorded
from finetune.safety import read_json
from ttt import TTTLMModel, ttt_parameters


@dataclass(frozen=True)
class EarlierRun:
    """A checkpoint or exported model to start from, with the configuration that made it, its
    config.json, and the file with all weights, if it has one."""

    checkpoint: Path
    args: TrainArgs
    config: dict[str, Any]
    base_weights: Path | None

    @property
    def folder(self) -> Path:
        """Return where its files of weights are."""
        return weights_folder(self.checkpoint)

    @property
    def has_adapters(self) -> bool:
        """Return whether it holds LoRA adapters that are not merged."""
        return self.args.lora.enable and self.args.save_adapters


def weights_folder(checkpoint: Path) -> Path:
    """Return where the weights of a checkpoint, or of an exported model, are."""
    return checkpoint if is_stock(checkpoint) else checkpoint / "consolidated"


def open_earlier_run(paths: ModelPaths) -> EarlierRun:
    """Open what `init_from` names.

    Raises:
        UserError: there is no checkpoint and no exported model, or it is damaged.
    """
    assert paths.init_from
    checkpoint = Path(paths.init_from)
    is_export = is_stock(checkpoint)
    if not is_export:
        require_checkpoint(checkpoint, "moshi_paths.init_from")
    file = weights_folder(checkpoint) / "config.json"
    require_part(file)
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"moshi_paths.init_from: cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"moshi_paths.init_from: {file} holds no `key: value` pairs.")
    if is_export:
        args, base = exported_args(checkpoint, config, paths), exported_weights(checkpoint, config)
    else:
        args = load_run_config(checkpoint / "args.yaml")
        all_weights = file.with_name("consolidated.safetensors")
        base = all_weights if all_weights.is_file() else None
    return EarlierRun(checkpoint, args, config, base)


def require_fit(
    earlier: EarlierRun, args: TrainArgs, shape: Mapping[str, Any], earlier_shape: Mapping[str, Any]
) -> None:
    """
    Args:
        shape, earlier_shape: what `LMModel` takes for this run, and for the earlier one.

    Raises:
        UserError: this run's configuration cannot go on from the earlier one's weights.
    """
    problems = [
        f"{keys}: {text}" for keys, text in misfits(args, shape, earlier.args, earlier_shape)
    ]
    if problems:
        what = f"starting from {earlier.checkpoint} (moshi_paths.init_from)"
        hint = ""
        if is_stock(earlier.checkpoint) and any("config_path" in each for each in problems):
            hint = (
                f"\nIt brings its own shape: set moshi_paths.hf_repo_id: {earlier.checkpoint} too."
            )
        raise UserError(list_problems(what, problems) + hint)


def misfits(
    args: TrainArgs,
    shape: Mapping[str, Any],
    earlier: TrainArgs,
    earlier_shape: Mapping[str, Any],
) -> Iterator[Problem]:
    """Why weights that `earlier` trained cannot be the start of `args`, key by key."""
    for key in sorted(shape.keys() | earlier_shape.keys()):
        there, here = earlier_shape.get(key), shape.get(key)
        if key != "context" and there != here:
            owner = (
                f"model.{key}" if hasattr(args.model, key) else f"moshi_paths.config_path, {key}"
            )
            yield owner, f"is {there} in the earlier run, and {here} here; they must be equal"
    if earlier.ttt.enabled and args.ttt.enabled:
        for name, there, here in changed_meaning(earlier.ttt, args.ttt):
            yield (
                f"ttt.{name}",
                f"is {there} in the earlier run, and {here} here: its TTT parameters mean "
                f"something else; set it to {there}",
            )
    if earlier.lora.enable and earlier.save_adapters:
        there, here = ((a.lora.enable, a.lora.rank, a.lora.scaling) for a in (earlier, args))
        if there != here:
            yield (
                "lora.enable, lora.rank, lora.scaling",
                f"the earlier run's adapters have rank {there[1]} and scaling {there[2]:g}, and "
                "this run has "
                + (f"rank {here[1]} and scaling {here[2]:g}" if here[0] else "no LoRA")
                + "; set the same, or have the earlier run merge them (save_adapters: false; of an "
                "exported model: export --form merged)",
            )


def trained_files(
    model: TTTLMModel, args: TrainArgs, earlier: EarlierRun
) -> Iterator[tuple[Path, set[str]]]:
    """The files of the earlier run's LoRA and TTT, as far as it has them and this run goes on with
    them, and the weights that they must hold."""
    yield from _adapter_files(model, earlier)
    if earlier.args.ttt.enabled and args.ttt.enabled:
        yield earlier.folder / "ttt.safetensors", set(ttt_parameters(model))


def _adapter_files(model: TTTLMModel, earlier: EarlierRun) -> Iterator[tuple[Path, set[str]]]:
    """Yield the files of LoRA, the oldest run's first: checkpoints of before do not hold embeddings
    that not they but the run which they started from has trained."""
    if not earlier.has_adapters:
        return
    if earlier.args.moshi_paths.init_from:
        yield from _adapter_files(model, open_earlier_run(earlier.args.moshi_paths))
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    yield earlier.folder / "lora.safetensors", lora


def adapter_roles(args: TrainArgs) -> set[str]:
    """Return the roles of the weights that a run saves as adapters (`lora.safetensors`); none where
    it saves no adapters.

    Embeddings are among them if this run trains them, or if one that it goes on from has: whoever
    has the file and the base has the whole model.

    Raises:
        UserError: an earlier run is not there any more, or is damaged.
    """
    if not (args.lora.enable and args.save_adapters):
        return set()
    if args.lora.ft_embed:
        return {"lora", "embedding"}
    if args.moshi_paths.init_from:
        earlier = open_earlier_run(args.moshi_paths)
        return {"lora"} | adapter_roles(earlier.args)
    return {"lora"}


def describe_start(args: TrainArgs, earlier: EarlierRun) -> str:
    """A line for the log: where the weights come from, and what becomes of TTT."""
    ttt = {
        (True, True): "; its TTT goes on",
        (False, True): "; TTT is added, untrained",
        (True, False): "; its TTT is left out (ttt.enabled: false)",
        (False, False): "",
    }[earlier.args.ttt.enabled, args.ttt.enabled]
    return f"starting from the weights of {earlier.checkpoint}{ttt}"


def base_weights(earlier: EarlierRun) -> Path:
    """Return the file that a run's base is in: its own, or the one that it started from.

    Raises:
        UserError: an earlier run, or the file, is not there; or the base was random.
    """
    if earlier.base_weights is not None:
        return earlier.base_weights
    paths = earlier.args.moshi_paths
    if paths.init_from:
        return base_weights(open_earlier_run(paths))
    if paths.random_init:
        raise UserError(
            f"moshi_paths.init_from: {earlier.checkpoint} holds what was trained on top of random "
            "weights, and not these weights; start from a run with full_finetuning: true."
        )
    if is_stock(earlier.checkpoint):
        return find_checkpoint(paths).moshi_weights
    return find_recorded(earlier.checkpoint / "args.yaml", paths).moshi_weights
