"""The recordings that the model continues."""

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from finetune.data import (
    FRAME_RATE_HZ,
    Codec,
    FileProblem,
    Recording,
    count_frames,
)
from finetune.errors import UserError
from finetune.evaluation.bench import Bench
from finetune.evaluation.codes import encode_to_file
from finetune.evaluation.tasks.health.options import ContinuationOptions

logger = logging.getLogger(__name__)


def require_long_enough(recordings: Sequence[Recording], wanted: ContinuationOptions) -> None:
    """
    Raises:
        UserError: no recording has anything behind the prompt.
    """
    prompt_frames = max(1, count_frames(wanted.prompt_sec))
    if max(map(_whole_frames, recordings)) <= prompt_frames:
        raise UserError(
            f"--prompt_sec: no recording is longer than {wanted.prompt_sec:g} s, behind which the "
            "model is to speak: give a lower one, or --tasks without health."
        )


def _whole_frames(recording: Recording) -> int:
    return math.floor(recording.duration_sec * FRAME_RATE_HZ)


def choose_prompts(
    bench: Bench, wanted: ContinuationOptions, prompt_frames: int, num_frames: int
) -> tuple[dict[Recording, Tensor], int]:
    """Return the codes [17, T] of the first recordings that are long enough to be continued, at
    most one for each continuation; and T, which is `num_frames` or as long as recordings are.

    Raises:
        UserError: none can be read.
    """
    longest = max(map(_whole_frames, bench.recordings))
    if longest < num_frames:
        num_frames = longest
        bench.note(
            f"No recording is long enough for --health_sec: continuations are "
            f"{(num_frames - prompt_frames) / FRAME_RATE_HZ:.1f} s long."
        )
    found: dict[Recording, Tensor] = {}
    for recording in bench.recordings:
        if len(found) == wanted.num_continuations:
            break
        if _whole_frames(recording) >= num_frames:
            try:
                found[recording] = _first_codes(bench.codec, recording, num_frames)
            except FileProblem as problem:
                missing = f"{recording.origin}: {problem}"
                bench.missing.setdefault("health", []).append(missing)
                logger.warning("missing: %s", missing)
    if not found:
        raise UserError("--data: no recording can be read to its end, to be continued.")
    return found, num_frames


def _first_codes(codec: Codec, recording: Recording, num_frames: int) -> Tensor:
    """
    Raises:
        FileProblem: the recording or its transcript cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "codes"
        codes = encode_to_file(codec, recording, target, max_frames=num_frames)
        return codes.read(0, num_frames)
