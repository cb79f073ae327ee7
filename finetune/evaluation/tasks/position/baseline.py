"""The loss of an earlier evaluation, of another checkpoint, to compare with."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data import FRAME_RATE_HZ, Recording
from finetune.errors import UserError
from finetune.evaluation.tasks.position.options import RESULTS, require_evaluation
from finetune.kept import read_records

logger = logging.getLogger(__name__)

_OPTIONS = {"bin_frames": "--bin_sec", "max_frames": "--max_sec"}
_KEYS = {
    "text_padding": "text_padding_weight",
    "first_codebook": "first_codebook_weight_multiplier",
}
"""What settings are called where they are given: for the evaluation, or for the training."""


class Baseline:
    """A baseline's loss by position is an arm `baseline` of this evaluation.

    Args:
        folder: what the earlier evaluation has written.
        settings: of this one's loss by position; that one's must be the same.
        recordings: of this one.

    Raises:
        UserError: there is none, or it cannot be compared with this one.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], recordings: Sequence[Recording]
    ) -> None:
        self.missing: list[str] = []
        """Of which recordings it has read something else."""
        require_evaluation(folder)
        earlier = read_records(folder / RESULTS, "--baseline")
        assert earlier is not None
        header, records = earlier
        self.fingerprint = str(header.get("checkpoint"))
        """Of its checkpoint."""
        self.dtype = str(header.get("dtype"))
        """In which it was evaluated."""
        _require_same_settings(folder, header, settings)
        arms = {record["arm"] for record in records}
        if not arms:
            raise UserError(
                f"--baseline: {folder} has no results yet, as it was stopped before the first. "
                "Finish that evaluation: the same command goes on."
            )
        if not arms & {"on", "off"}:
            raise UserError(
                f"--baseline: {folder} has the arms {', '.join(sorted(arms))} alone, which are "
                "controls. Evaluate its checkpoint with the arm on, or off if it has no TTT."
            )
        wanted = "on" if "on" in arms else "off"
        # By its file as well, where that holds no other: so it is called in earlier evaluations.
        by_file = Counter(os.path.realpath(recording.path) for recording in recordings)
        files = {os.path.realpath(recording.path): recording for recording in recordings}
        own = {name: recording for name, recording in files.items() if by_file[name] == 1}
        own |= {os.path.realpath(recording.location): recording for recording in recordings}
        # The last record of a recording is that of its file's last version.
        found = {
            name: record | {"arm": "baseline", "recording": own[name].location}
            for record in records
            if record["arm"] == wanted and (name := os.path.realpath(record["recording"])) in own
        }
        self._records = [
            record
            for name, record in found.items()
            if self._is_of_the_same(record, own[name].path.stat().st_size, "size_bytes")
        ]
        if not self._records:
            raise UserError(
                f"--baseline: {folder} is of other recordings than these"
                f"{', or of what their files once were' if found else ''}. Evaluate its checkpoint "
                "on these, and name what that writes."
            )

    def comparable(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the baseline's records that are of the same frames as these."""
        own = {record["recording"]: record for record in records}
        return [
            record
            for record in self._records
            if (other := own.get(record["recording"]))
            and self._is_of_the_same(record, other["num_frames"], "num_frames")
            and self._has_the_same_words(record, other)
        ]

    def _has_the_same_words(self, record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """By how many tokens of each kind there are in each bin."""
        if _counts(record) == _counts(other):
            return True
        self._miss(f"{record['recording']}: its words, or their times, were others in the baseline")
        return False

    def _is_of_the_same(self, record: Mapping[str, Any], value: int, name: str) -> bool:
        if record[name] == value:
            return True
        self._miss(f"{record['recording']}: {name} was {record[name]} in the baseline, is {value}")
        return False

    def _miss(self, text: str) -> None:
        self.missing.append(text)
        logger.warning("missing: %s", text)


def _counts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: of["count"] for name, of in record["streams"].items()}


def _require_same_settings(
    folder: Path, header: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    for name, value in settings.items():
        if name not in header:
            raise UserError(
                f"--baseline: {folder / RESULTS} does not say with what settings it was made. "
                "Evaluate its checkpoint again, with --overwrite."
            )
        if header[name] == value:
            continue
        there, here = (_shown(name, each) for each in (header[name], value))
        remedy = (
            "give the same here, or evaluate the baseline's checkpoint again with these"
            if name in _OPTIONS
            else "the trainings weigh their losses otherwise, and no option changes that"
        )
        raise UserError(
            f"--baseline: {folder} was evaluated with {there}, and this is with {here}, so that "
            f"they cannot be compared: {remedy}."
        )


def _shown(name: str, value: Any) -> str:
    if name not in _OPTIONS:
        return f"{_KEYS.get(name, name)} {value}"
    option = _OPTIONS[name]
    return f"no {option}" if value is None else f"{option}={value / FRAME_RATE_HZ:g}"
