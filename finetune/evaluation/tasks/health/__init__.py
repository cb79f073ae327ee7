"""The task `health`: is what the model says still speech?

prompts.py chooses what is continued, measure.py measures it, also in training; summary.py and
figure.py tell what came out.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.evaluation.tasks.base import Found, Json, Task
from finetune.evaluation.tasks.health.options import HealthOptions
from finetune.report import Table, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune.evaluation.bench import Bench, Inputs

logger = logging.getLogger(__name__)


class Health(Task):
    """Measures of continuations beside those of the recordings themselves, and alarms."""

    name = "health"
    title = "Health of generated speech"
    options = HealthOptions
    common_options = ("batch_size", "seed")

    def runs_unasked(self, options: Any) -> bool:
        return True

    def prepare(self, inputs: Inputs, options: HealthOptions) -> None:
        from finetune.evaluation.tasks.health.prompts import require_long_enough

        require_long_enough(inputs.recordings, options.health)

    def run(self, bench: Bench, options: HealthOptions, prepared: None) -> Json:
        import torch

        from finetune.data import FRAME_RATE_HZ, count_frames
        from finetune.evaluation.fingerprints import file_versions
        from finetune.evaluation.tasks.health.measure import check_health
        from finetune.evaluation.tasks.health.prompts import choose_prompts
        from finetune.evaluation.tasks.health.summary import summarize_health

        wanted, seed, batch_size = options.health, bench.options.seed, bench.options.batch_size
        prompt_frames = max(1, count_frames(wanted.prompt_sec))
        num_frames = prompt_frames + max(1, count_frames(wanted.health_sec))
        # What is replaced while it is read counts as the earlier one, and is read again next time.
        version_of = {each: file_versions(*each.files) for each in bench.recordings}
        codes, num_frames = choose_prompts(bench, wanted, prompt_frames, num_frames)
        prompts = [list(codes)[index % len(codes)] for index in range(wanted.num_continuations)]
        versions = [version_of[recording] for recording in prompts]
        # By their files, where each holds one: so they are called in earlier results.
        by_file = Counter(str(recording.path) for recording in bench.recordings)
        names = [str(r.path) if by_file[str(r.path)] == 1 else r.location for r in prompts]
        settings = {
            **dataclasses.asdict(wanted),
            "seed": seed,
            "num_frames": num_frames,
            "batch_size": batch_size,
            "prompts": names,
        }
        records = bench.records(self.name, settings)
        by_index = {
            record["index"]: record
            for record in records
            if record.get("version") == versions[record["index"]]
        }
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            if {*range(start, start + len(batch))} <= by_index.keys():
                continue
            results = check_health(
                bench.model,
                bench.codec,
                torch.stack([codes[recording] for recording in batch]).to(bench.model.device),
                prompt_frames=prompt_frames,
                seed=seed + start,
                temperature=wanted.temperature,
                text_temperature=wanted.text_temperature,
            )
            for index, result in enumerate(results, start):
                by_index[index] = {"index": index, "version": versions[index], **result}
                records.append(by_index[index])
            logger.info("health: %d of %d continuations", start + len(batch), len(prompts))
        return {
            **summarize_health([by_index[i] for i in range(len(prompts))], seed=seed),
            "prompt_sec": prompt_frames / FRAME_RATE_HZ,
            "continuation_sec": (num_frames - prompt_frames) / FRAME_RATE_HZ,
            "seed": seed,
        }

    def sentences(self, found: Found) -> Iterable[str]:
        alarms = [f"Alarm: {alarm['text']} ({alarm['measure']})." for alarm in found["alarms"]]
        return alarms or [f"No sign of collapse in {found['num_continuations']} continuations."]

    def note(self, found: Found) -> str:
        return (
            f"{found['num_continuations']} continuations of {found['continuation_sec']:g} s after "
            f"{found['prompt_sec']:g} s of prompt, seed {found['seed']}. The recordings in the "
            "same seconds are measured in the same way, and the limits are made of them."
        )

    def figure(self, found: Found, model: Found) -> Figure:
        from finetune.evaluation.tasks.health.figure import health_figure

        return health_figure(found, model["vocabulary"])

    def tables(self, found: Found) -> Sequence[Table]:
        from finetune.evaluation.tasks.health.measure import MEANING

        names = {alarm["measure"] for alarm in found["alarms"]}
        alarming = [row for row, name in enumerate(found["measures"]) if name in names]
        rows = [
            [
                MEANING[name],
                plain(of["generated"]),
                plain(of["recorded"]),
                of["alarm_if"],
                "alarm" if name in names else "",
            ]
            for name, of in found["measures"].items()
        ]
        columns = ("measure", "continuations", "recordings", "alarm if", "")
        return [Table(columns, rows, alarming=alarming)]

    def csv(self, found: Found) -> Table:
        rows = [
            [name, kind, *(of[kind][key] for key in ("value", "low", "high"))]
            for name, of in found["measures"].items()
            for kind in ("generated", "recorded")
        ]
        return Table(("measure", "of", "mean", "low", "high"), rows)

    def scalars(self, found: Found) -> dict[str, float | None]:
        return {name: of["generated"]["value"] for name, of in found["measures"].items()}


TASK = Health()
