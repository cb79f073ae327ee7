"""The tasks of an evaluation work on a bench."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config import TrainArgs
from finetune.data import Codec, Reading, Recording, check_recordings
from finetune.errors import UserError
from finetune.evaluation.common_options import CommonOptions
from finetune.evaluation.fingerprints import checkpoint_fingerprint
from finetune.inference import check_attention_window, load_for_inference
from finetune.kept import Records
from finetune.step import LossWeights
from ttt import TTTLMModel

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raise it when the same options give other records."""


@dataclass(kw_only=True)
class Inputs:
    """Inputs are known before the model is loaded: all that can be wrong with the data comes
    first."""

    options: CommonOptions
    args: TrainArgs
    """The checkpoint's configuration."""
    recordings: list[Recording]
    """Of `--data`, those that look usable; none if no task reads them."""
    weights: LossWeights
    """Of the loss, as in training."""
    missing: dict[str, list[str]] = field(default_factory=dict)
    """What could not be read, by the task that it is missing in."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the results should know."""
    warnings: list[str] = field(default_factory=list)
    """What makes all results mean less; it is told before them."""

    def warn(self, text: str) -> None:
        """Have a warning in the log and before all conclusions."""
        self.warnings.append(text)
        logger.warning("%s", text)

    def note(self, text: str) -> None:
        """Have a note in the log and in the report."""
        self.notes.append(text)
        logger.info("%s", text)


@dataclass(kw_only=True)
class Bench(Inputs):
    """A bench has the inputs, and the model."""

    model: TTTLMModel
    """In eval mode."""
    codec: Codec
    window_frames: int
    """The largest number of frames that attention sees."""
    vocabulary: dict[str, int]
    """The number of different tokens of each stream."""
    identity: dict[str, Any]
    """What all records depend on."""

    def records(self, name: str, settings: Mapping[str, Any]) -> Records:
        """Return the results that a task has already, in `NAME.jsonl`, to be added to.

        Args:
            settings: all options that a record depends on.

        Raises:
            UserError: those that are there depend on something else, and are not to be replaced.
        """
        path, overwrite = self.options.out / f"{name}.jsonl", self.options.overwrite
        return Records(path, {**self.identity, **settings}, overwrite=overwrite)


def load_bench(inputs: Inputs) -> Bench:
    """Load the checkpoint.

    Raises:
        UserError: see `load_for_inference`; or its attention has no window.
    """
    options = inputs.options
    # Before the model, which takes a while: of files that are gone since, it would be another one.
    fingerprint = checkpoint_fingerprint(Path(options.checkpoint))
    model, codec = load_for_inference(options.checkpoint, options.device)
    return Bench(
        **vars(inputs),
        model=model,
        codec=codec,
        window_frames=check_attention_window(model),
        vocabulary={
            "text": model.text_linear.out_features,
            "words": model.text_linear.out_features,
            "first_codebook": model.card,
            "other_codebooks": model.card,
        },
        identity={
            "format": FORMAT,
            "checkpoint": fingerprint,
            "dtype": str(model.dtype),
        },
    )


def usable_recordings(options: CommonOptions, args: TrainArgs) -> tuple[list[Recording], list[str]]:
    """Return the recordings of `--data`, each once, and what is wrong with the others.

    Raises:
        UserError: there is none.
    """
    spec = options.data
    assert spec is not None
    recordings, problems = check_recordings(
        spec, key="--data", reading=Reading.of(args.data, training=False)
    )
    for problem in problems[:5]:
        logger.warning("missing: %s", problem)
    if problems:
        total = len(problems) + len(recordings)
        logger.warning("%d of %d recordings are missing", len(problems), total)
    if not recordings:
        raise UserError(f"--data: {spec} holds no usable recording: {problems[0]}")
    unique = list({recording.location: recording for recording in recordings}.values())
    return unique[: options.limit], problems
