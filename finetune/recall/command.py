"""`moshi-ttt recall`: run what is asked for, write the results, and say what came out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from finetune.distributed import join_world
from finetune.monitoring import setup_logging
from finetune.recall import report
from finetune.recall.arms import ARMS, check_arms
from finetune.recall.experiment import run
from finetune.recall.folder import prepare_folder, write_report
from finetune.recall.options import RecallOptions, Variant
from finetune.recall.presets import Preset, preset


def run_command(options: RecallOptions) -> str:
    """Run what the options say; returns what is to be printed."""
    if options.variant == "spoken":
        from finetune.recall.spoken.command import run_spoken

        return run_spoken(options)
    return run_recall(
        options.folder,
        size=options.preset,
        variant=options.variant,
        arms=list(options.arms or ()),
        seeds=list(options.seeds),
        num_steps=options.steps,
        lengths=None if options.lengths is None else [n for n in options.lengths if n],
        device=options.device,
        workers=options.workers,
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
    place = join_world(device).device  # type: ignore[arg-type]
    prepare_folder(out, f"--preset {size} --variant {variant}")
    results = run(
        chosen,
        out / "runs",
        arms=arms or chosen.arms,
        seeds=seeds,
        device=place,
        workers=workers,
    )
    report.write_csv(results, out / "recall.csv")
    report.plot(results, out / "recall.png")
    return write_report("\n".join(_report(chosen, results)), out)


def _counts(lengths: Sequence[int], known: dict[int, int]) -> dict[int, int]:
    """Sequences of each length: as many as of the preset's longest that is not longer."""
    return {
        times: known[max((t for t in known if t <= times), default=min(known))] for times in lengths
    }


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
