"""`moshi-ttt recall`: run what is asked for, write the results, and say what came out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from finetune.console import setup_logging
from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.recall import report, study
from finetune.recall.experiment import run
from finetune.recall.presets import Preset, preset
from finetune.recall.streams import Variant


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
    chosen = _preset(size, variant)
    if lengths is not None:
        chosen = dataclasses.replace(chosen, lengths=_counts(lengths, chosen.lengths))
    if num_steps is not None:
        chosen = dataclasses.replace(chosen, num_steps=num_steps)
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
        times: known[max((t for t in known if t <= times), default=min(known))]
        for times in lengths
        if times > 1
    }


def run_key_study(out: Path, *, widths: Sequence[int]) -> str:
    """How well untrained models tell keys apart; returns a table, which is in `out/report.md` too.

    Raises:
        UserError: `out` cannot be written.
    """
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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {out}: {error.strerror}.") from error
    return _write("\n".join(lines), out)


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
    lines = [
        f"Recall, {streams.variant}: {streams.num_pairs} facts in the first quarter of "
        f"{streams.num_frames} frames, each asked for again more than {streams.reach_frames} "
        f"frames later, which is as far as {model.num_layers} windows of {model.context} frames "
        f"reach ({model.num_layers} x {model.context - 1}). Chance is "
        f"{1 / streams.num_values:.2f}. {sizes[0] / 1e6:.2g} to {sizes[-1] / 1e6:.2g} million "
        f"parameters, {chosen.num_steps} steps of {chosen.batch_size} sequences.",
        "",
        *report.trained_length_table(results),
    ]
    longer = report.longer_table(results)
    if longer:
        lines += ["", "On longer sequences, at facts within one chunk:", "", *longer]
    inner = report.inner_loss_table(results)
    if inner:
        lines += ["", "What the inner loops did, in training:", "", *inner]
    return lines


def _write(text: str, out: Path) -> str:
    try:
        (out / "report.md").write_text(text + "\n")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out}: {error.strerror}.") from error
    return text
