"""The origin of a checkpoint: how it was trained, on what, and how two of them differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.checkpoint import (
    OF_FROZEN_WEIGHTS,
    Part,
    earlier_parts_of,
    frozen_fingerprint_of,
)
from finetune.config import (
    TrainArgs,
    changed_keys,
    flatten,
    keys_that,
    load_run_config,
    public_dict,
)
from finetune.data import FRAME_RATE_HZ, Recording, in_training, listed_recordings
from finetune.kept import CHECKPOINT_NAME, Kept, is_stock, step_of
from finetune.plan import SUMMARY
from ttt import TTTArgs
from ttt.options import HARMLESS, MEASURED
from ttt.registry import METHODS

CONFIGURATION = "args.yaml"
"""In a checkpoint."""
_PLACES = ("start_layer", "layer_frequency")

Json = dict[str, Any]


class Difference(NamedTuple):
    """A configuration key, or a number of the training, in which two checkpoints differ."""

    name: str
    own: str
    other: str


class Differences(NamedTuple):
    """All in which a checkpoint and a baseline differ."""

    of_ttt: list[Difference]
    beyond: list[Difference]


def describe_origin(checkpoint: Path) -> Json:
    """Return how far and from which seed a checkpoint was trained, and on how many segments a step,
    None where nothing says so, as for a stock Moshi; the fingerprint of the frozen weights that it
    was trained on; and the parts of its training that had another configuration."""
    if is_stock(checkpoint):
        unknown = dict.fromkeys(("step", "seed", "segments_per_step", "frozen_weights"))
        return unknown | {"earlier_parts": []}
    summary = Kept(checkpoint.absolute().parent.parent / SUMMARY).read() or {}
    return {
        "step": step_of(checkpoint) if CHECKPOINT_NAME.fullmatch(checkpoint.name) else None,
        "seed": load_run_config(checkpoint / CONFIGURATION).seed,
        "segments_per_step": summary.get("segments_per_step"),
        "frozen_weights": frozen_fingerprint_of(checkpoint),
        "earlier_parts": earlier_parts_of(checkpoint),
    }


def earlier_notes(parts: Sequence[Part]) -> Iterator[str]:
    """Yield what a reader of the configuration has to know of the parts of a training before."""
    for part in parts:
        keys = ", ".join(f"{key} was {value}" for key, value in part["before"].items())
        yield (
            f"Until step {part['until_step']} this checkpoint was trained with another "
            f"configuration than after it ({keys}): it was resumed so."
        )


def name_of(checkpoint: Path) -> str:
    """Return what reports call a checkpoint: by its run as well, if it lies in one."""
    checkpoint = checkpoint.absolute()
    in_run = checkpoint.parent.name == "checkpoints"
    return f"{checkpoint.parent.parent.name}/{checkpoint.name}" if in_run else checkpoint.name


def describe_details(args: TTTArgs) -> list[str]:
    """Return what a method writes, and how often, as far as it has such options."""
    option, frames = METHODS[args.method].update_option, args.update_frames
    details = [f"target {args.target}"] if args.reads("target") else []
    if option:
        details.append(f"{option} {frames} ({frames / FRAME_RATE_HZ:g} s)")
    return details


def trained_on(args: TrainArgs, recordings: Sequence[Recording]) -> list[Recording]:
    """Return those of `recordings` that a run of `args` has trained on, whole, in part or in copies
    of their files.

    Raises:
        UserError: a list of its training data is no longer there, or cannot be read.
    """
    if not args.data.train_data:
        return []
    listed = listed_recordings(args.data.train_data, key="data.train_data")
    return in_training(listed, recordings)


def differences(
    own: Path,
    other: Path,
    own_parts: Sequence[Part] = (),
    other_parts: Sequence[Part] = (),
    *,
    is_same_base: bool = False,
) -> Differences:
    """Return the configuration keys in which two runs differ, or did in an earlier part of their
    training, that both of them read.

    A key that one of them does not read has nothing to be compared with: the chunk size of a run
    without TTT.

    Args:
        own, other: files that runs have written, `args.yaml`, or copies of them.
        own_parts, other_parts: earlier parts of their training.
        is_same_base: their frozen weights are known to be the same, wherever they lay.

    Raises:
        UserError: one of them cannot be read.
    """
    runs = [load_run_config(path) for path in (own, other)]
    unimportant = keys_that(TrainArgs, HARMLESS, MEASURED)
    unimportant |= OF_FROZEN_WEIGHTS if is_same_base else set()
    last = changed_keys(other, runs[0])
    by_key = [(key, Difference(key, of_own, of_other)) for key, (of_other, of_own) in last.items()]
    found = Differences([], [])
    for key, difference in [*by_key, *_earlier_differences(runs, (own_parts, other_parts))]:
        if key not in unimportant and all(_reads(args, key) for args in runs):
            part = found.of_ttt if _is_of_ttt(key, runs) else found.beyond
            part.append(difference)
    return found


def _earlier_differences(
    runs: Sequence[TrainArgs], parts: tuple[Sequence[Part], Sequence[Part]]
) -> Iterator[tuple[str, Difference]]:
    """Yield keys in which two trainings differed up to a step at which one of them was resumed."""
    last = [flatten(public_dict(args)) for args in runs]
    steps_of: dict[str, set[int]] = {}
    for part in (*parts[0], *parts[1]):
        for key in part["before"]:
            steps_of.setdefault(key, set()).add(part["until_step"])
    for key, steps in sorted(steps_of.items()):
        # By their values, of which the last step counts.
        values = {
            tuple(_value_at(step, key, *each) for each in zip(parts, last, strict=True)): step
            for step in sorted(steps)
        }
        for (own, other), step in values.items():
            if own != other:
                yield key, Difference(f"{key} until step {step}", own, other)


def _value_at(step: int, key: str, parts: Sequence[Part], last: Mapping[str, Any]) -> str:
    values = [p["before"][key] for p in parts if p["until_step"] >= step and key in p["before"]]
    return values[0] if values else str(last.get(key))


def _reads(args: TrainArgs, key: str) -> bool:
    """Return whether a run reads a key, as far as that depends on other keys."""
    section, _, name = key.rpartition(".")
    if section == "lora":
        return args.lora.enable or name == "enable"
    if key == "optim.ttt_lr":
        return args.ttt.enabled
    if section != "ttt" or name in ("enabled", "attention_context"):
        return True
    if args.ttt.enabled:
        return args.ttt.reads(name)
    return name in _PLACES and args.ttt.attention_context is not None


def _is_of_ttt(key: str, runs: Sequence[TrainArgs]) -> bool:
    """Return whether a key changes TTT alone. A shorter window of attention is none of it, nor is
    where it is."""
    section, _, name = key.rpartition(".")
    if name in _PLACES:
        return all(args.ttt.attention_context is None for args in runs)
    return key == "optim.ttt_lr" or (section == "ttt" and name != "attention_context")
