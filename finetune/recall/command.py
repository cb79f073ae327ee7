"""`moshi-ttt recall`: run what is asked for, write the results, and say what came out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.monitoring import setup_logging
from finetune.recall import report, study
from finetune.recall.arms import ARMS, check_arms
from finetune.recall.experiment import run
from finetune.recall.options import RecallOptions, Variant
from finetune.recall.presets import Preset, preset


def run_command(options: RecallOptions) -> str:
    """Run what the options say; returns what is to be printed."""
    out, widths = options.folder, list(options.widths or ())
    if options.study == "keys":
        return run_key_study(out, widths=widths)
    where: dict[str, Any] = {
        "seeds": list(options.seeds or (0,)),
        "device": options.device or "auto",
        "workers": options.workers or 1,
    }
    if options.study == "scale":
        return run_scale_study(out, widths=widths, **where)
    return run_recall(
        out,
        size=options.preset or "cpu",
        variant=options.variant or "text",
        arms=list(options.arms or ()),
        num_steps=options.steps,
        lengths=None if options.lengths is None else [n for n in options.lengths if n],
        **where,
    )


def run_recall(
    out: Path,
    *,
    size: Literal["cpu", "gpu"],
    variant: Variant,
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
    chosen = preset(size, variant=variant)
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
    """Return how well untrained models tell keys apart; returns a table, which is in
    `out/report.md` too.

    Raises:
        UserError: `out` cannot be written.
    """
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
