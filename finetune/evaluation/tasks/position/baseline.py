"""The loss of an earlier evaluation, of another checkpoint, to compare with."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data import Recording
from finetune.errors import UserError
from finetune.evaluation.tasks.position.options import RESULTS, require_evaluation
from finetune.kept import read_records

logger = logging.getLogger(__name__)


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
        for name, value in settings.items():
            if header.get(name) != value:
                raise UserError(
                    f"--baseline: {folder} was evaluated with {name} {header.get(name)}, and this "
                    f"is {value}: they cannot be compared."
                )
        wanted = "on" if any(record["arm"] == "on" for record in records) else "off"
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
                f"{', or of what their files once were' if found else ''}."
            )

    def comparable(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the baseline's records that are of the same frames as these."""
        num_frames = {record["recording"]: record["num_frames"] for record in records}
        return [
            record
            for record in self._records
            if (frames := num_frames.get(record["recording"]))
            and self._is_of_the_same(record, frames, "num_frames")
        ]

    def _is_of_the_same(self, record: Mapping[str, Any], value: int, name: str) -> bool:
        if record[name] == value:
            return True
        text = f"{record['recording']}: {name} was {record[name]} in the baseline, is {value}"
        self.missing.append(text)
        logger.warning("missing: %s", text)
        return False
