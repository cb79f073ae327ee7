"""`moshi-ttt evaluate`: the tasks one after another, and what is written of them.

In the output folder: `NAME.jsonl` of every task with results as they come, which a later call
continues, and `NAME.csv` with its table; `results.json`; `report.html`; what tasks add themselves.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from finetune.config import SOURCES, TrainArgs, resolved_sources
from finetune.data import num_different
from finetune.distributed import peak_memory_gb
from finetune.errors import UserError
from finetune.evaluation.bench import Bench, Inputs, load_bench, usable_recordings
from finetune.evaluation.common_options import ALWAYS_READ, what_takes_less
from finetune.evaluation.dashboard import to_wandb
from finetune.evaluation.earlier import (
    KEPT_CONFIGURATION,
    REPORT,
    RESULTS,
    remove_others,
    require_nothing_replaced,
)
from finetune.evaluation.fingerprints import checkpoint_fingerprint
from finetune.evaluation.options import Options
from finetune.evaluation.origin import (
    CONFIGURATION,
    describe_details,
    describe_origin,
    earlier_notes,
    name_of,
    trained_on,
)
from finetune.evaluation.report import report_page
from finetune.evaluation.tasks import TASKS
from finetune.inference import checkpoint_args, nonfinite_weights
from finetune.kept import held_folder, is_stock, write_whole
from finetune.monitoring import setup_logging
from finetune.report import html_page, write_csv
from finetune.safety import without_nan
from finetune.step import LossWeights

logger = logging.getLogger(__name__)


def evaluate_checkpoint(options: Options) -> dict[str, Any]:
    """Run the tasks of `options` and write the results; returns what `results.json` holds.

    Raises:
        UserError: wrong paths, data that cannot be read at all, options that contradict each other
            or an earlier evaluation in the same folder; nothing of what was asked for could be
            measured; or the GPU's memory is too small.
    """
    setup_logging()
    options.check()
    try:
        return _evaluate(options)
    except torch.OutOfMemoryError as error:
        peak_gb = peak_memory_gb(torch.device("cuda"))
        raise UserError(
            f"The GPU ran out of memory ({peak_gb:.1f} GB were in use at most). Less memory takes: "
            f"{what_takes_less(options)}. What is done is kept in {options.out}."
        ) from error


def _evaluate(options: Options) -> dict[str, Any]:
    args = checkpoint_args(options.checkpoint, options.device)
    options = _with_data(options, args)
    if not options.overwrite:
        fingerprint = checkpoint_fingerprint(options.checkpoint)
        model = {"name": name_of(options.checkpoint), "fingerprint": fingerprint}
        require_nothing_replaced(options.out, model, _told(options))
    # Before anything is measured: a training may delete the checkpoint meanwhile.
    configuration, origin = _configuration(options.checkpoint), describe_origin(options.checkpoint)
    inputs = _read_inputs(options, args)
    for note in earlier_notes(origin["earlier_parts"]):
        inputs.note(note)
    tasks = [TASKS[name] for name in options.tasks]
    prepared = {task.name: task.prepare(inputs, options) for task in tasks}
    with held_folder(options.out, "--out"):
        bench = load_bench(inputs)
        problem = nonfinite_weights(bench.model)
        bad_weights = [] if problem is None else [f"{problem}: nothing here means anything."]
        found: dict[str, Any] = {}
        try:
            for task in tasks:
                found[task.name] = task.run(bench, options, prepared[task.name])
        except KeyboardInterrupt:
            logger.info("interrupted; what is done is kept: the same command continues")
            raise
        warnings = [f"Warning: {warning}" for warning in bench.warnings]
        told = [sentence for task in tasks for sentence in task.sentences(found[task.name])]
        described = _described(bench, options, origin, is_kept=configuration is not None)
        results = {**described, "conclusions": [*bad_weights, *warnings, *told], **found}
        _write(options, results, configuration)
        if options.overwrite:
            remove_others(options.out, bench.identity["checkpoint"], options.tasks)
    reasons = [reason for task in tasks if (reason := task.why_nothing(found[task.name]))]
    if reasons:
        raise UserError("\n".join([*reasons, f"What there is lies in {options.out}."]))
    return results


def _with_data(options: Options, args: TrainArgs) -> Options:
    """Return the options with the data that are read: where none are named, the run's own."""
    if options.data is not None or not any(TASKS[name].uses_recordings for name in options.tasks):
        return options
    if not args.data.eval_data:
        raise UserError(
            "--data: name the JSONL of the recordings; the checkpoint's configuration names no "
            "data.eval_data."
        )
    key = f"data.eval_data of {options.checkpoint / CONFIGURATION}"
    try:
        SOURCES.require(args.data.eval_data, key)
    except UserError as error:
        raise UserError(
            f"--data was not given, and {error} Name the recordings with --data, or work in the "
            "folder in which the run was started."
        ) from None
    return dataclasses.replace(options, data=args.data.eval_data)


def _configuration(checkpoint: Path) -> bytes | None:
    """Return a checkpoint's configuration as it is written; a stock Moshi has none."""
    return None if is_stock(checkpoint) else (checkpoint / CONFIGURATION).read_bytes()


def _read_inputs(options: Options, args: TrainArgs) -> Inputs:
    weights = LossWeights(args.text_padding_weight, args.first_codebook_weight_multiplier)
    inputs = Inputs(options=options, args=args, recordings=[], weights=weights)
    if any(TASKS[name].uses_recordings for name in options.tasks):
        inputs.recordings, inputs.missing["data"] = usable_recordings(options, args)
        _look_for_training_data(inputs)
    return inputs


def _look_for_training_data(inputs: Inputs) -> None:
    """Add a warning where the model has trained on the recordings, and a note where it is not
    known."""
    try:
        trained = trained_on(inputs.args, inputs.recordings)
    except UserError as error:
        inputs.note(f"Whether the model has trained on these recordings is not known: {error}")
        return
    if trained:
        inputs.warn(
            f"{len(trained)} of the {num_different(inputs.recordings)} recordings are in the "
            f"checkpoint's data.train_data, whole, in part or as a copy ({trained[0].title}): "
            "their loss does not show how well other speech is modeled."
        )


def _described(
    bench: Bench, options: Options, origin: Mapping[str, Any], *, is_kept: bool
) -> dict[str, Any]:
    """Return all of the results but what the tasks have found.

    Args:
        origin: of the checkpoint, see `describe_origin`.
        is_kept: whether its configuration lies beside the results.
    """
    checkpoint = options.checkpoint
    method = "".join({layer.describe() for layer in bench.model.ttt_layers.values()})
    layers = ", ".join(map(str, bench.model.ttt_layers))
    details = "".join(f", {part}" for part in describe_details(bench.model.ttt_args))
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": name_of(checkpoint),
            "checkpoint": str(checkpoint.absolute()),
            "fingerprint": bench.identity["checkpoint"],
            "ttt": f"TTT: {method}{details} in layers {layers}" if layers else "no TTT",
            **origin,
            "configuration": KEPT_CONFIGURATION if is_kept else None,
            "vocabulary": bench.vocabulary,
            "text_padding_weight": bench.weights.text_padding,
            "first_codebook_weight_multiplier": bench.weights.first_codebook,
        },
        "options": _told(options),
        "notes": bench.notes,
        "missing": {task: whats for task, whats in bench.missing.items() if whats},
    }


def _told(options: Options) -> dict[str, Any]:
    """Return the options that were read by name, those in sections by dotted name, without what is
    secret."""
    read = {*ALWAYS_READ}.union(*(TASKS[name].options_read() for name in options.tasks))
    values = {name: v for name, v in dataclasses.asdict(options).items() if name in read}
    del values["wandb"]["key"]
    for section in [name for name, value in values.items() if isinstance(value, Mapping)]:
        values |= {f"{section}.{name}": value for name, value in values.pop(section).items()}
    plain = {name: _plain(value) for name, value in values.items()}
    if plain.get("data"):
        plain["data"] = resolved_sources(plain["data"], "--data")
    return plain


def _write(options: Options, results: dict[str, Any], configuration: bytes | None) -> None:
    out = options.out
    if configuration is not None:
        # Another evaluation compares with it when the checkpoint may be gone. results.json names it
        # and so comes later.
        write_whole(out / KEPT_CONFIGURATION, configuration)
    text = json.dumps(without_nan(results), indent=1, allow_nan=False)
    write_whole(out / RESULTS, text + "\n")
    for name in options.tasks:
        table = TASKS[name].csv(results[name])
        write_csv(out / f"{name}.csv", table.columns, table.rows)
    page = html_page(report_page(results))
    write_whole(out / REPORT, page)
    if options.wandb.project:
        to_wandb(options, results, page)


def _plain(value: Any) -> Any:
    # A later evaluation compares it from another folder.
    return str(value.resolve()) if isinstance(value, Path) else value
