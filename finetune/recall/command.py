"""`moshi-ttt recall`: run what is asked for, write the results, and say what came out."""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, get_args

from finetune.config import items, one_of, whole_number, whole_numbers
from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.monitoring import setup_logging
from finetune.recall import report, study
from finetune.recall.experiment import check_arms, run
from finetune.recall.presets import ARMS, Preset, preset
from finetune.recall.streams import Variant


def run_command(given: Mapping[str, str]) -> str:
    """See `finetune.cli.recall`; returns what it prints.

    Args:
        given: the options that were given, as typed, by name.
    """
    study_name = given.get("study")
    _refuse_unread(study_name, given.keys() - {"out", "study"})
    size, variant = given.get("preset") or "cpu", given.get("variant") or "text"
    out = Path(given["out"]) if given.get("out") else default_out(study_name, size, variant)
    if study_name == "keys":
        return run_key_study(out, widths=_widths(given))
    where: dict[str, Any] = {
        "seeds": whole_numbers("seeds", given.get("seeds", "0"), low=0),
        "device": one_of("device", given.get("device") or "auto", ("auto", "cpu", "cuda")),
        "workers": whole_number("workers", given.get("workers", "1"), low=1),
    }
    if study_name == "scale":
        return run_scale_study(out, widths=_widths(given), **where)
    return run_recall(
        out,
        size=size,
        variant=variant,
        arms=items("arms", given["arms"]) if "arms" in given else [],
        num_steps=whole_number("steps", given["steps"], low=2) if "steps" in given else None,
        lengths=_lengths(given["lengths"]) if "lengths" in given else None,
        **where,
    )


def _refuse_unread(study_name: str | None, given: Set[str]) -> None:
    """Options that what is asked for does not read."""
    common = {"seeds", "workers", "device"}
    read = {
        None: {"preset", "variant", "arms", "steps", "lengths"} | common,
        "scale": {"widths"} | common,
        "keys": {"widths"},
    }
    if study_name not in read:
        raise UserError(f"--study: there is no {study_name!r}; choose scale or keys.")
    if given - read[study_name]:
        unread = ", ".join(f"--{name}" for name in sorted(given - read[study_name]))
        mode = f"with --study {study_name}" if study_name else "without --study"
        raise UserError(f"{unread}: not read {mode}; leave it out.")


def _widths(given: Mapping[str, str]) -> list[int]:
    return whole_numbers("widths", given["widths"], low=16) if "widths" in given else []


def _lengths(text: str) -> list[int]:
    lengths = whole_numbers("lengths", text, low=0)
    if lengths == [0]:
        return []
    if min(lengths) < 2:
        raise UserError(
            "--lengths: expected whole numbers of at least 2 (the trained length is always "
            f"measured), or 0 alone for none, got {text!r}."
        )
    return lengths


def run_recall(
    out: Path,
    *,
    size: str,
    variant: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    num_steps: int | None,
    lengths: Sequence[int] | None,
    device: str,
    workers: int,
) -> str:
    """The experiment; returns its report, which is in `out/report.md` as well.

    Args:
        size: the name of a preset.
        arms: none: all of the preset.
        num_steps, lengths: instead of the preset's.

    Raises:
        UserError: an impossible choice, or `out` cannot be written.
    """
    setup_logging()
    check_arms(arms)
    chosen = _preset(size, variant)
    if lengths is not None:
        chosen = dataclasses.replace(chosen, lengths=_counts(lengths, chosen.lengths))
    if num_steps is not None:
        chosen = dataclasses.replace(chosen, num_steps=num_steps)
    _prepare(out, f"--preset {size} --variant {variant}")
    results = run(
        chosen,
        out / "runs",
        arms=arms or chosen.arms,
        seeds=seeds,
        device=join_world(device).device,  # type: ignore[arg-type]
        workers=workers,
    )
    report.write_csv(results, out / "recall.csv")
    report.plot(results, out / "recall.png")
    return _write("\n".join(_report(chosen, results)), out)


def run_scale_study(
    out: Path, *, widths: Sequence[int], seeds: Sequence[int], device: str, workers: int
) -> str:
    """The study of scales; returns its report, which is in `out/report.md` as well.

    Raises:
        UserError: `out` cannot be written.
    """
    setup_logging()
    _check_widths(widths)
    _prepare(out, "--study scale")
    results = study.run_study(
        study.cells(widths=widths or study.WIDTHS, seeds=seeds),
        out / "runs",
        device=join_world(device).device,  # type: ignore[arg-type]
        workers=workers,
    )
    lines = [
        f"Accuracy at facts within one chunk after {study.NUM_STEPS} steps or less (chance "
        f"{1 / results[0]['config']['streams']['num_values']:.2f}):",
        "",
        *report.study_table(results),
    ]
    return _write("\n".join(lines), out)


def _counts(lengths: Sequence[int], known: dict[int, int]) -> dict[int, int]:
    """Sequences of each length: as many as of the preset's longest that is not longer."""
    return {
        times: known[max((t for t in known if t <= times), default=min(known))] for times in lengths
    }


def run_key_study(out: Path, *, widths: Sequence[int]) -> str:
    """How well untrained models tell keys apart; returns a table, which is in `out/report.md` too.

    Raises:
        UserError: `out` cannot be written.
    """
    _check_widths(widths)
    _prepare(out, "--study keys")
    lines = [
        "Cosine of z at a question and at its own fact / at the others (share of questions nearest "
        "to their own fact), before training:",
        "",
        "| width | embeddings' std | first layer | second layer |",
        "| --- | --- | --- | --- |",
    ]
    for width in widths or study.WIDTHS:
        for std in study.EMBEDDING_STDS:
            cells = [
                f"{own:.2f} / {others:.2f} ({nearest:.2f})"
                for own, others, nearest in study.key_match(std, width).values()
            ]
            lines.append(f"| {width} | {std:g} | {' | '.join(cells)} |")
    return _write("\n".join(lines), out)


def default_out(study_name: str | None, size: str, variant: str) -> Path:
    """Where results go if nothing is said: no two experiments into one folder."""
    name = f"study_{study_name}" if study_name else "gpu_" * (size == "gpu") + variant
    return Path("runs/recall") / name


def _prepare(out: Path, experiment: str) -> None:
    """Make the folders and write to them, before hours are spent on what could not be kept.

    Raises:
        UserError: that is impossible, or another experiment's results are there: they have the same
            names, and would be replaced.
    """
    for folder in (out, out / "runs"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trial = folder / ".trial"
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise UserError(f"--out: cannot write to {folder}: {error.strerror}.") from error
    mark = out / "experiment.txt"
    earlier = mark.read_text(encoding="utf-8").strip() if mark.is_file() else experiment
    if earlier != experiment:
        raise UserError(
            f"--out: {out} has the results of `moshi-ttt recall {earlier}`, which those of "
            f"{experiment} would replace. Name another folder, or none: without --out each "
            f"experiment has its own."
        )
    mark.write_text(f"{experiment}\n", encoding="utf-8")


def _check_widths(widths: Sequence[int]) -> None:
    for width in widths:
        num_heads = study.num_heads(width)
        if width % (2 * num_heads):
            raise UserError(
                f"--widths: {width} cannot be divided into {num_heads} heads of an even size; "
                f"choose a multiple of {2 * num_heads}."
            )


def _preset(size: str, variant: str) -> Preset:
    if size not in ("cpu", "gpu"):
        raise UserError(f"--preset: there is no {size!r}; choose cpu or gpu.")
    if variant not in get_args(Variant):
        raise UserError(
            f"--variant: there is no {variant!r}; choose from {', '.join(get_args(Variant))}."
        )
    return preset(size, variant=variant)  # type: ignore[arg-type]


def _report(chosen: Preset, results: Sequence[dict[str, Any]]) -> list[str]:
    streams, model = chosen.streams, chosen.model
    sizes = sorted({result["parameters"] for result in results})
    what, again = f"{streams.num_pairs} facts", "each asked for again"
    if streams.variant == "segments":
        what = f"one segment of {2 * streams.num_pairs} frames"
        again = "heard again, and its text asked for from the second frame on,"
    lines = [
        f"Recall, {streams.variant}: {what} in the first quarter of {streams.num_frames} frames, "
        f"{again} more than {streams.reach_frames} frames later, which is as far as "
        f"{model.num_layers} windows of {model.context} frames reach ({model.num_layers} x "
        f"{model.context - 1}). Chance is {1 / streams.num_answers:.2f}. "
        f"{sizes[0] / 1e6:.2g} to {sizes[-1] / 1e6:.2g} million parameters, "
        f"{chosen.num_steps} steps of {chosen.batch_size} sequences.",
        "",
        *report.trained_length_table(results),
    ]
    longer = report.longer_table(results)
    if longer:
        lines += ["", "On longer sequences, at facts within one chunk:", "", *longer]
        left_out = [arm for arm in report.arms_of(results) if ARMS[arm].is_full_attention]
        if left_out:
            lines += [
                "",
                f"`{left_out[0]}` is left out: its attention sees the trained length and no more, "
                "so that on longer sequences it is a windowed model.",
            ]
    inner = report.inner_loss_table(results)
    if inner:
        lines += ["", "What the inner loops did, in training:", "", *inner]
    return lines


def _write(text: str, out: Path) -> str:
    try:
        (out / "report.md").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out}: {error.strerror}.") from error
    return text
