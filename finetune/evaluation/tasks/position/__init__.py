"""The task `position`: loss by position in the recording, with TTT and with controls.

measure.py reads the recordings, baseline.py the results of an earlier evaluation; summary.py makes
numbers of them, figure.py and sentences.py show them. compared.py tells how the trainings of two
checkpoints differ.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, counted
from finetune.evaluation.streams import STREAM_TITLES, STREAMS
from finetune.evaluation.tasks.base import Found, Json, Task
from finetune.evaluation.tasks.position.options import PositionOptions, require_evaluation
from finetune.report import Table, plain, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune.evaluation.bench import Bench, Inputs
    from finetune.evaluation.tasks.position.baseline import Baseline


class Position(Task):
    """Loss by position of every arm, and paired differences between arms."""

    name = "position"
    title = "Loss by position"
    options = PositionOptions

    def runs_unasked(self, options: Any) -> bool:
        return True

    def check(self, options: Any, *, is_chosen: bool) -> None:
        if not is_chosen and options.baseline is not None:
            raise UserError("--baseline: counts for the task position alone; add it to --tasks.")
        if options.baseline is not None and options.baseline.resolve() == options.out.resolve():
            raise UserError(
                f"--baseline: {options.baseline} is where this evaluation is written itself. Give "
                "another --out, or name the evaluation of another checkpoint."
            )
        if options.baseline is not None and options.baseline.is_dir():
            require_evaluation(options.baseline)

    def prepare(self, inputs: Inputs, options: PositionOptions) -> tuple[Baseline, Json] | None:
        from finetune.evaluation.tasks.position.baseline import Baseline
        from finetune.evaluation.tasks.position.compared import compare

        prepared = None
        if options.baseline is not None:
            settings = _settings(inputs, options)
            baseline = Baseline(options.baseline, settings, inputs.recordings)
            inputs.missing["baseline"] = baseline.missing
            checkpoint = inputs.options.checkpoint
            prepared = baseline, compare(options.baseline, baseline.fingerprint, checkpoint)
        _check_reset(inputs, options)
        return prepared

    def run(
        self, bench: Bench, options: PositionOptions, prepared: tuple[Baseline, Json] | None
    ) -> Json:
        from finetune.data import FRAME_RATE_HZ
        from finetune.evaluation.tasks.position.measure import PositionRun
        from finetune.evaluation.tasks.position.summary import summarize_positions

        settings = _settings(bench, options)
        every = bench.model.ttt_args.update_frames
        reset_frames = options.reset_frames or max(bench.window_frames, 2 * every)
        warnings: list[str] = []
        # Before anything is said of arms: what is there already may be of other settings.
        records = bench.records(self.name, settings)
        arms = _arms_there_are(bench, options, reset_frames, warnings)
        with tempfile.TemporaryDirectory(prefix="codes_", dir=bench.options.out) as folder:
            work = PositionRun(
                bench.model,
                bench.codec,
                bench.recordings,
                arms=arms,
                reset_frames=reset_frames,
                bin_frames=settings["bin_frames"],
                max_frames=settings["max_frames"],
                batch_size=bench.options.batch_size,
                block_frames=bench.options.block_frames,
                weights=bench.weights,
                records=records,
                folder=Path(folder),
            )
            work.run()
        bench.missing.setdefault(self.name, []).extend(work.missing.values())
        if work.not_finite:
            some = counted(len(work.not_finite), "recording")
            warnings.append(
                f"The loss of {some} is not finite in some arm: counted nowhere, and listed as "
                "missing data."
            )
        found = work.results()
        baseline, compared = prepared or (None, None)
        if baseline and baseline.dtype != bench.identity["dtype"]:
            warnings.append(
                f"The baseline was evaluated in {baseline.dtype}, and this checkpoint in "
                f"{bench.identity['dtype']}: small differences may be those of rounding."
            )
        summary = summarize_positions(
            found + (baseline.comparable(found) if baseline else []),
            bin_frames=settings["bin_frames"],
            window_frames=bench.window_frames,
            vocabulary=bench.vocabulary,
            seed=bench.options.seed,
        )
        return {
            **summary,
            "reset_sec": reset_frames / FRAME_RATE_HZ,
            "ttt_wrote": _longest_frames(bench, options) > every,
            "baseline": compared,
            "warnings": warnings,
        }

    def sentences(self, found: Found) -> Iterable[str]:
        from finetune.evaluation.tasks.position.sentences import sentences

        return sentences(found)

    def note(self, found: Found) -> str:
        from finetune.monitoring import format_duration
        from finetune.statistics import MIN_SEQUENCES

        if not found["num_recordings"]:
            return "No recording could be read."
        few = found["num_recordings"] < MIN_SEQUENCES
        caution = (
            f" With less than {MIN_SEQUENCES} recordings there are no intervals." if few else ""
        )
        return (
            f"{counted(found['num_recordings'], 'recording')}, "
            f"{format_duration(found['duration_sec'])} together, the longest "
            f"{format_duration(found['longest_sec'])}. Cross-entropy in nats per token, weighted "
            f"as in training, read in streaming mode from the start of each recording. In "
            f"brackets: 95 % intervals, bootstrap over recordings; differences are paired. The "
            f"intervals are over recordings alone: how much another training seed would change is "
            f"not in them. Slopes are within recordings, each with a level of its own, and of "
            f"those that are long enough: three bins for one per doubling, 6 min beyond the "
            f"window for one per hour.{caution}"
        )

    def figure(self, found: Found, model: Found) -> Figure | None:
        from finetune.evaluation.tasks.position.figure import position_figure

        return position_figure(found) if found["num_recordings"] else None

    def tables(self, found: Found) -> Sequence[Table]:
        from finetune.evaluation.tasks.position.compared import compared_table
        from finetune.evaluation.tasks.position.figure import arm_label

        columns = (
            "stream",
            "mean",
            "beyond the window",
            "slope per doubling of position",
            "slope per hour, beyond the window",
        )
        differences = [
            [" − ".join(d["arms"]), STREAM_TITLES[stream], *_cells(d[stream], signed)]
            for d in found.get("differences", ())
            for stream in STREAMS
        ]
        arms = [
            [arm_label(arm, found), STREAM_TITLES[stream], *_cells(of_stream[stream], plain)]
            for arm, of_stream in found["arms"].items()
            for stream in STREAMS
        ]
        tables = [Table(("compared", *columns), differences), Table(("arm", *columns), arms)]
        if baseline := found.get("baseline"):
            tables.insert(0, compared_table(baseline))
        return tables

    def csv(self, found: Found) -> Table:
        keys = ("start_sec", "stop_sec", "count", "weight", "value", "low", "high")
        rows = [
            [name, stream, *(point[key] for key in keys)]
            for name, of in _curves(found)
            for stream in STREAMS
            for point in of[stream]["curve"]
        ]
        columns = ["arm", "stream", "start_sec", "stop_sec", "num_recordings", "weight"]
        return Table([*columns, "loss", "low", "high"], rows)

    def scalars(self, found: Found) -> dict[str, float | None]:
        return {
            f"{name}/{stream}/{place}": of[stream][place]["value"]
            for name, of in _curves(found)
            for stream in found["guessing"]
            for place in ("mean", "beyond_window")
        }


def _settings(inputs: Inputs, options: PositionOptions) -> Json:
    """Return what the records of a recording depend on, beside the checkpoint."""
    from finetune.evaluation.tasks.position.measure import frames_of

    return {
        "bin_frames": frames_of(options.bin_sec) or 1,
        "max_frames": frames_of(options.max_sec),
        **dataclasses.asdict(inputs.weights),
    }


def _curves(found: Found) -> list[tuple[str, Found]]:
    differences = [("-".join(d["arms"]), d) for d in found.get("differences", ())]
    return [*found["arms"].items(), *differences]


def _cells(of_stream: Found, show: Callable[..., str]) -> list[str]:
    places = ("mean", "beyond_window", "slope_per_doubling", "slope_per_hour_beyond_window")
    return [show(of_stream[p], 4) if "slope" in p or show is signed else show(of_stream[p])
            for p in places]  # fmt: skip


def _longest_frames(bench: Bench, options: PositionOptions) -> int:
    """Return the length of the longest recording, as far as it is read."""
    from finetune.evaluation.tasks.position.measure import estimated_frames, frames_of

    max_frames = frames_of(options.max_sec)
    return max(estimated_frames(recording, max_frames) for recording in bench.recordings)


def _arms_there_are(
    bench: Bench, options: PositionOptions, reset_frames: int, warnings: list[str]
) -> list[str]:
    """Return those of the asked-for arms that there are for this checkpoint and data."""
    from finetune.data import FRAME_RATE_HZ
    from finetune.evaluation.tasks.position.measure import frames_of, long_enough

    if not bench.model.ttt_layers:
        bench.note("This checkpoint has no TTT: its loss is that of the arm `off`, alone.")
        return ["off"]
    arms: list[str] = list(options.arms)
    update_frames = bench.model.ttt_args.update_frames
    longest_frames = _longest_frames(bench, options)
    if longest_frames <= update_frames:
        warnings.append(
            f"No recording is longer than one chunk of {update_frames} frames "
            f"({update_frames / FRAME_RATE_HZ:g} s): TTT never wrote, and nothing can be said "
            f"about it."
        )
        return [arm for arm in arms if arm in ("on", "off")]
    donors = long_enough(bench.recordings, update_frames, frames_of(options.max_sec))
    if "carried" in arms and len(donors) < 2:
        arms.remove("carried")
        bench.note(
            f"The arm `carried` is left out: it needs two recordings of at least the "
            f"{update_frames} frames after which TTT writes."
        )
    if "reset" in arms and longest_frames <= reset_frames:
        arms.remove("reset")
        bench.note(
            f"What is read of no recording is longer than the {reset_frames} frames after "
            f"which TTT would be reset: the arm `reset` is left out. A lower --reset_frames "
            f"may bring it back; it must exceed {update_frames}."
        )
    return arms


def _check_reset(inputs: Inputs, options: PositionOptions) -> None:
    """
    Raises:
        UserError: resets so frequent that nothing learned is ever read.
    """
    ttt_args = inputs.args.ttt
    wanted, least = options.reset_frames, ttt_args.update_frames + 1
    if ttt_args.enabled and "reset" in options.arms and wanted is not None and wanted < least:
        raise UserError(
            f"--reset_frames: TTT writes after every {least - 1} frames in this checkpoint. "
            f"Reset every {wanted} frames, it would never read what it has learned, and the arm "
            f"`reset` would be the arm `off`. Give at least {least}, better some times that."
        )


TASK = Position()
