"""`moshi-ttt evaluate`: the tasks one after another, and what is written of them.

In the output folder: `position.jsonl`, `pairs.jsonl` and `health.jsonl` with results as they come,
which a later call continues; `results.json`; tables as `.csv`; `zerospeech.txt`; `report.html`.
"""

import dataclasses
import json
import logging
import math
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from finetune.config import TrainArgs
from finetune.data import (
    FRAME_RATE_HZ,
    FileProblem,
    Reading,
    Recording,
    check_recordings,
    count_frames,
)
from finetune.distributed import peak_memory_gb
from finetune.errors import UserError
from finetune.inference import checkpoint_args, load_for_inference, nonfinite_weights
from finetune.monitoring import setup_logging
from finetune.safety import without_nan
from finetune.step import LossWeights

from .baseline import Baseline
from .codes import encode_to_file
from .conclusions import conclusions
from .dashboard import to_wandb
from .health import check_health
from .options import Options, what_takes_less
from .pairs import Pair, PairTask, read_pairs, zerospeech_lines
from .position import PositionTask, estimated_frames, frames_of, long_enough
from .records import Records, checkpoint_fingerprint
from .report import html_report, write_tables
from .streaming import check_attention_window
from .summary import summarise_health, summarise_pairs, summarise_positions

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raise it when the same options give other records."""


class Evaluation:
    """One evaluation of one checkpoint.

    Raises:
        UserError: wrong paths, data that cannot be read at all, options that contradict each other
            or an earlier evaluation in the same folder.
    """

    def __init__(self, options: Options) -> None:
        setup_logging()
        self.options = options
        options.check()
        self.args: TrainArgs = checkpoint_args(options.checkpoint, options.device)
        # All that can be wrong with the data comes before the model is loaded.
        self.missing: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.recordings = self._recordings() if {"position", "health"} & {*options.tasks} else []
        self.pairs: list[Pair] = []
        if "pairs" in options.tasks:
            assert options.pairs is not None
            self.pairs = read_pairs(options.pairs)
        self.weights = LossWeights(
            self.args.text_padding_weight, self.args.first_codebook_weight_multiplier
        )
        self.position_settings = {
            "bin_frames": frames_of(options.bin_sec) or 1,
            "max_frames": frames_of(options.max_sec),
            **dataclasses.asdict(self.weights),
        }
        self.baseline: Baseline | None = None
        if options.baseline is not None:
            self.baseline = Baseline(options.baseline, self.position_settings, self.recordings)
            self.missing["baseline"] = self.baseline.missing
        self._check_reset()
        self.model, self.codec = load_for_inference(options.checkpoint, options.device)
        problem = nonfinite_weights(self.model)
        self.bad_weights = [] if problem is None else [f"{problem}: nothing here means anything."]
        self.window_frames = check_attention_window(self.model)
        self.reset_frames = options.reset_frames or max(
            self.window_frames, 2 * self.model.ttt_args.update_frames
        )
        self.vocabulary = {
            "text": self.model.text_linear.out_features,
            "words": self.model.text_linear.out_features,
            "first_codebook": self.model.card,
            "other_codebooks": self.model.card,
        }
        self.identity = {
            "format": FORMAT,
            "checkpoint": checkpoint_fingerprint(options.checkpoint),
            "dtype": str(self.model.dtype),
        }

    def run(self) -> dict[str, Any]:
        """All tasks; returns what `results.json` holds."""
        results: dict[str, Any] = {}
        tasks = {"position": self.position, "pairs": self.paired, "health": self.health}
        try:
            for name in self.options.tasks:
                results[name] = tasks[name]()
        except KeyboardInterrupt:
            logger.info("interrupted; what is done is kept: the same command continues")
            raise
        results = self._described(results)
        self._write(results)
        return results

    # The tasks ------------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        options, settings = self.options, self.position_settings
        records = Records(options.out / "position.jsonl", self.identity | settings)
        warnings: list[str] = []
        arms = self._arms(warnings)
        with tempfile.TemporaryDirectory(prefix="codes_", dir=options.out) as folder:
            task = PositionTask(
                self.model,
                self.codec,
                self.recordings,
                options=options,
                arms=arms,
                reset_frames=self.reset_frames,
                weights=self.weights,
                records=records,
                folder=Path(folder),
            )
            task.run()
        self.missing.setdefault("position", []).extend(task.missing.values())
        if task.not_finite:
            warnings.append(
                f"The loss of {len(task.not_finite)} recordings is not finite in some arm; they "
                f"are counted nowhere and listed as missing data."
            )
        found = task.results()
        summary = summarise_positions(
            found + (self.baseline.comparable(found) if self.baseline else []),
            bin_frames=task.bin_frames,
            window_frames=self.window_frames,
            vocabulary=self.vocabulary,
            seed=options.seed,
        )
        return {
            **summary,
            "reset_sec": self.reset_frames / FRAME_RATE_HZ,
            "ttt_wrote": self._longest_frames() > self.model.ttt_args.update_frames,
            "warnings": warnings,
        }

    def _longest_frames(self) -> int:
        """Of what is read of the recordings."""
        max_frames = self.position_settings["max_frames"]
        return max(estimated_frames(recording, max_frames) for recording in self.recordings)

    def _arms(self, warnings: list[str]) -> list[str]:
        """Those of the asked-for arms that there are for this checkpoint and data."""
        if not self.model.ttt_layers:
            self._note("This checkpoint has no TTT: its loss is that of the arm `off`, alone.")
            return ["off"]
        arms: list[str] = list(self.options.arms)
        update_frames = self.model.ttt_args.update_frames
        if self._longest_frames() <= update_frames:
            warnings.append(
                f"No recording is longer than one chunk of {update_frames} frames "
                f"({update_frames / FRAME_RATE_HZ:g} s): TTT never wrote, and nothing can be said "
                f"about it."
            )
            return [arm for arm in arms if arm in ("on", "off")]
        max_frames = self.position_settings["max_frames"]
        if "carried" in arms and len(long_enough(self.recordings, update_frames, max_frames)) < 2:
            arms.remove("carried")
            self._note(
                f"The arm `carried` is left out: it needs two recordings of at least the "
                f"{update_frames} frames after which TTT writes."
            )
        if "reset" in arms and self._longest_frames() <= self.reset_frames:
            arms.remove("reset")
            self._note(
                f"What is read of no recording is longer than the {self.reset_frames} frames after "
                f"which TTT would be reset: the arm `reset` is left out. A lower --reset_frames "
                f"may bring it back; it must exceed {update_frames}."
            )
        return arms

    def _check_reset(self) -> None:
        """
        Raises:
            UserError: resets so frequent that nothing learnt is ever read.
        """
        wanted, least = self.options.reset_frames, self.args.ttt.update_frames + 1
        counts = self.args.ttt.enabled and {"position"} <= {*self.options.tasks}
        if counts and "reset" in self.options.arms and wanted is not None and wanted < least:
            raise UserError(
                f"--reset_frames: TTT writes after every {least - 1} frames in this checkpoint. "
                f"Reset every {wanted} frames, it would never read what it has learnt, and the arm "
                f"`reset` would be the arm `off`. Give at least {least}, better some times that."
            )

    def paired(self) -> dict[str, Any]:
        options = self.options
        settings = {"side": options.pair.side, "text": options.pair.text}
        records = Records(options.out / "pairs.jsonl", self.identity | settings)
        task = PairTask(
            self.model,
            self.codec,
            self.pairs,
            options=options.pair,
            batch_size=options.batch_size,
            block_frames=options.block_frames,
            records=records,
        )
        task.run()
        found = task.results()
        summary = summarise_pairs(self.pairs, found, task.missing, options.pair)
        self.missing["pairs"] = [f"{id}: {why}" for id, why in summary["missing"].items()]
        lines = zerospeech_lines(self.pairs, found, options.pair)
        (options.out / "zerospeech.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )
        return summary

    def health(self) -> dict[str, Any]:
        options, wanted = self.options, self.options.health
        prompt_frames = max(1, count_frames(wanted.prompt_sec))
        num_frames = prompt_frames + max(1, count_frames(wanted.health_sec))
        codes, num_frames = self._prompts(prompt_frames, num_frames)
        prompts = [list(codes)[index % len(codes)] for index in range(wanted.num_continuations)]
        settings = {
            **dataclasses.asdict(wanted),
            "seed": options.seed,
            "num_frames": num_frames,
            "batch_size": options.batch_size,
            "prompts": [str(recording.path) for recording in prompts],
        }
        records = Records(options.out / "health.jsonl", self.identity | settings)
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            if {*range(start, start + len(batch))} <= {record["index"] for record in records}:
                continue
            results = check_health(
                self.model,
                self.codec,
                torch.stack([codes[recording] for recording in batch]).to(self.model.device),
                prompt_frames=prompt_frames,
                seed=options.seed + start,
                temperature=wanted.temperature,
                text_temperature=wanted.text_temperature,
            )
            for index, result in enumerate(results, start):
                records.append({"index": index, **result})
            logger.info("health: %d of %d continuations", start + len(batch), len(prompts))
        by_index = {record["index"]: record for record in records}
        return {
            **summarise_health([by_index[i] for i in range(len(prompts))], seed=options.seed),
            "prompt_sec": prompt_frames / FRAME_RATE_HZ,
            "continuation_sec": (num_frames - prompt_frames) / FRAME_RATE_HZ,
            "seed": options.seed,
        }

    def _prompts(
        self, prompt_frames: int, num_frames: int
    ) -> tuple[dict[Recording, torch.Tensor], int]:
        """The codes [17, T] of the first recordings that are long enough to be continued, at most
        one for each continuation; and T."""

        def whole_frames(recording: Recording) -> int:
            return math.floor(recording.duration_sec * FRAME_RATE_HZ)

        longest = max(whole_frames(recording) for recording in self.recordings)
        if longest <= prompt_frames:
            raise UserError(
                f"--prompt_sec: no recording is longer than {self.options.health.prompt_sec:g} s."
            )
        if longest < num_frames:
            num_frames = longest
            self._note(
                f"No recording is long enough for --health_sec: continuations are "
                f"{(num_frames - prompt_frames) / FRAME_RATE_HZ:.1f} s long."
            )
        found: dict[Recording, torch.Tensor] = {}
        for recording in self.recordings:
            if len(found) == self.options.health.num_continuations:
                break
            if whole_frames(recording) >= num_frames:
                try:
                    found[recording] = self._first_codes(recording, num_frames)
                except FileProblem as problem:
                    missing = f"{recording.origin}: {problem}"
                    self.missing.setdefault("health", []).append(missing)
                    logger.warning("missing: %s", missing)
        if not found:
            raise UserError("--data: no recording can be read to its end, to be continued.")
        return found, num_frames

    def _first_codes(self, recording: Recording, num_frames: int) -> torch.Tensor:
        """
        Raises:
            FileProblem: the recording or its transcript cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "codes"
            codes = encode_to_file(self.codec, recording, target, max_frames=num_frames)
            return codes.read(0, num_frames)

    # Data and results -----------------------------------------------------------------------------

    def _recordings(self) -> list[Recording]:
        spec = self.options.data or self.args.data.eval_data
        if not spec:
            raise UserError(
                "--data: name the JSONL of the recordings; the checkpoint's configuration names no "
                "data.eval_data."
            )
        recordings, problems = check_recordings(
            spec,
            key="--data",
            reading=Reading.of(self.args.data, training=False),
        )
        for problem in problems[:5]:
            logger.warning("missing: %s", problem)
        if problems:
            total = len(problems) + len(recordings)
            logger.warning("%d of %d recordings are missing", len(problems), total)
        if not recordings:
            raise UserError(f"--data: {spec} holds no usable recording: {problems[0]}")
        self.missing["data"] = problems
        unique = list({str(recording.path): recording for recording in recordings}.values())
        return unique[: self.options.limit]

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.info("%s", text)

    def _described(self, results: dict[str, Any]) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        del options["wandb"]["key"]
        for section in ("pair", "health", "wandb"):
            options |= {f"{section}.{name}": v for name, v in options.pop(section).items()}
        args = self.args.ttt
        layers = ", ".join(map(str, self.model.ttt_layers))
        described = f"TTT: {args.method} ({args.write}) in layers {layers}" if layers else "no TTT"
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": {
                "name": _name(self.options.checkpoint),
                "checkpoint": str(self.options.checkpoint),
                "fingerprint": self.identity["checkpoint"],
                "ttt": described,
                "vocabulary": self.vocabulary,
                "text_padding_weight": self.weights.text_padding,
                "first_codebook_weight_multiplier": self.weights.first_codebook,
            },
            "options": {name: _plain(value) for name, value in options.items()},
            "notes": self.notes,
            "missing": {task: whats for task, whats in self.missing.items() if whats},
            "conclusions": [*self.bad_weights, *conclusions(results)],
            **results,
        }

    def _write(self, results: dict[str, Any]) -> None:
        out = self.options.out
        text = json.dumps(without_nan(results), indent=1, allow_nan=False)
        (out / "results.json").write_text(text + "\n", encoding="utf-8")
        write_tables(results, out)
        page = html_report(results)
        (out / "report.html").write_text(page, encoding="utf-8")
        if self.options.wandb.project:
            to_wandb(self.options, results, page)


def evaluate_checkpoint(options: Options) -> dict[str, Any]:
    """Run the tasks of `options` and write the results; returns what `results.json` holds.

    Raises:
        UserError: see `Evaluation`; or the GPU's memory is too small.
    """
    try:
        return Evaluation(options).run()
    except torch.OutOfMemoryError as error:
        peak_gb = peak_memory_gb(torch.device("cuda"))
        raise UserError(
            f"The GPU ran out of memory ({peak_gb:.1f} GB were in use at most). Less memory takes: "
            f"{what_takes_less(options)}. What is done is kept in {options.out}."
        ) from error


def _name(checkpoint: Path) -> str:
    checkpoint = checkpoint.absolute()
    in_run = checkpoint.parent.name == "checkpoints"
    return f"{checkpoint.parent.parent.name}/{checkpoint.name}" if in_run else checkpoint.name


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
