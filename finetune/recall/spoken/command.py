"""`moshi-ttt recall --variant spoken`: make the dialogues, run the arms, and say what came out."""

from __future__ import annotations

import dataclasses
import os

from finetune.distributed import join_world
from finetune.errors import UserError
from finetune.monitoring import setup_logging
from finetune.recall.arms import check_arms
from finetune.recall.folder import prepare_folder, write_report
from finetune.recall.options import RecallOptions
from finetune.recall.spoken import report
from finetune.recall.spoken.experiment import run
from finetune.recall.spoken.presets import SpokenPreset, preset


def run_spoken(options: RecallOptions) -> str:
    """The experiment; returns its report, which is in the folder as well.

    Raises:
        UserError: an impossible choice, espeak-ng is not installed, or the folder cannot be
            written.
    """
    setup_logging()
    check_arms(options.arms or ())
    chosen = _chosen(options)
    out = options.folder
    device = join_world(options.device).device
    prepare_folder(out, f"--preset {options.preset} --variant {options.variant}")
    results = run(
        chosen,
        out / "runs",
        arms=options.arms or chosen.arms,
        seeds=options.seeds,
        device=device,
        workers=options.workers,
        data_workers=os.cpu_count() or 1,
    )
    report.plot(chosen, results, out / "recall.png")
    return write_report("\n".join(report.lines(chosen, results)), out)


def _chosen(options: RecallOptions) -> SpokenPreset:
    chosen = preset(options.preset)
    if options.lengths is not None:
        known = chosen.data.lengths
        lengths = {
            times: known[max((t for t in known if t <= times), default=min(known))]
            for times in options.lengths
            if times
        }
        chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, lengths=lengths))
    if options.steps is not None:
        steps = options.steps
        chosen = dataclasses.replace(chosen, num_steps=steps, finetune_steps=steps)
    problems = chosen.data.dialogues.problems()
    if problems:
        raise UserError("these dialogues cannot be made: " + "; ".join(problems) + ".")
    return chosen
