"""What is compared where there is a baseline: two checkpoints, and how their trainings differ."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.evaluation.earlier import KEPT_CONFIGURATION
from finetune.evaluation.fingerprints import checkpoint_fingerprint
from finetune.evaluation.origin import (
    CONFIGURATION,
    Difference,
    describe_origin,
    differences,
)
from finetune.evaluation.tasks.base import Found, Json
from finetune.kept import Kept, is_stock
from finetune.report import Table

_NUMBERS = {"step": "step of the checkpoint", "segments_per_step": "segments a step"}


def compare(folder: Path, fingerprint: str, checkpoint: Path) -> Json:
    """Return what the baseline is, and in what its training and a checkpoint's differ.

    Args:
        folder: what the baseline's evaluation has written.
        fingerprint: of the baseline's checkpoint.
        checkpoint: what is compared with it.

    Raises:
        UserError: a configuration cannot be read.
    """
    kept = (Kept(folder / "results.json").read() or {}).get("model", {})
    # The folder's last evaluation may have been of another checkpoint, with other tasks.
    model = kept if kept.get("fingerprint") == fingerprint else {}
    found: Json = {"name": model.get("name", str(folder)), "ttt": model.get("ttt")}
    found["is_same"] = checkpoint_fingerprint(checkpoint) == fingerprint
    if is_stock(checkpoint):
        return found | {"unknown": "this checkpoint is a stock Moshi or an export"}
    if not model:
        return found | {"unknown": f"{folder} has no results.json of it"}
    name = model.get("configuration", KEPT_CONFIGURATION)
    if name is None:
        return found | {"unknown": "it is a stock Moshi or an export"}
    configuration, place = folder / name, Path(model["checkpoint"])
    is_there = (place / CONFIGURATION).is_file() and checkpoint_fingerprint(place) == fingerprint
    if not configuration.is_file():  # lost, or never kept: by an evaluation of before
        if not is_there:
            gone = f"{folder} has no {name}, and {place} is no longer there, or another one"
            return found | {"unknown": gone}
        configuration = place / CONFIGURATION
    if is_there:  # an evaluation of before has not noted all of it
        model = describe_origin(place) | model
    own = describe_origin(checkpoint)
    parts = (own["earlier_parts"], model.get("earlier_parts", []))
    base = own["frozen_weights"]
    is_same = base is not None and base == model.get("frozen_weights")
    told = differences(checkpoint / CONFIGURATION, configuration, *parts, is_same_base=is_same)
    found |= told._asdict()
    found["beyond"] += [
        Difference(name, str(own[key]), str(model[key]))
        for key, name in _NUMBERS.items()
        if own[key] != model[key] and None not in (own[key], model[key])
    ]
    return found


def compared_sentence(baseline: Found) -> str:
    """Return what is compared, and whether that is TTT alone."""
    ttt = f" ({baseline['ttt']})" if baseline["ttt"] else ""
    what = f"this checkpoint and the baseline, {baseline['name']}{ttt}"
    if baseline["is_same"]:
        return f"Warning: {what}, are the same, so all their differences are zero."
    if reason := baseline.get("unknown"):
        return (
            f"Warning: how {what}, were trained cannot be compared ({reason}), so what follows "
            f"from their comparison need not be due to TTT."
        )
    of_ttt, beyond = (_listed(baseline[part]) for part in ("of_ttt", "beyond"))
    if beyond:
        return (
            f"Warning: {what}, differ in more than TTT, so their comparison is not of TTT alone: "
            f"in {beyond}. In TTT they differ in {of_ttt or 'no key'}."
        )
    if of_ttt:
        return f"What is compared: {what}, differ in TTT alone: in {of_ttt}."
    return f"Warning: {what}, were trained alike: no key of their configurations differs."


def reservation(baseline: Found) -> str:
    """Return what is to be added where the two are compared, if it is no comparison of TTT alone;
    else nothing. `compared_sentence` has the particulars."""
    if baseline.get("is_same"):
        return ", which is this checkpoint itself"
    if baseline.get("unknown"):
        return "; how the two were trained cannot be compared, so this need not be due to TTT"
    if beyond := baseline.get("beyond"):
        names = ", ".join(name for name, *_ in beyond)
        return f"; they differ in more than TTT, so this need not be due to TTT ({names})"
    return ""


def _listed(found: Iterable[Sequence[str]]) -> str:
    return ", ".join(f"{name} {own} (baseline: {other})" for name, own, other in found)


def compared_table(baseline: Found) -> Table:
    """Return the keys in which the two differ."""
    parts = {"beyond": "beyond TTT", "of_ttt": "TTT"}
    rows = [[*each, part] for key, part in parts.items() for each in baseline.get(key, ())]
    columns = ("differs in training", "this checkpoint", "baseline", "part of")
    return Table(columns, rows, wraps=True)
