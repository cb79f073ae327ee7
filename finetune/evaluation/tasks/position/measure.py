"""Loss by position in the recording, with TTT and with controls.

Every recording is read from its start to its end in streaming mode, once for each arm:

    on       as trained
    off      without the TTT layers
    reset    TTT forgets what it has learned every so many frames; attention does not
    carried  TTT starts with what it has learned from another recording: must not help
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ttt
from finetune.data import FRAME_RATE_HZ, Codec, FileProblem, Recording
from finetune.evaluation.bin_sums import BinSums, first_not_finite
from finetune.evaluation.codes import CodesFile, encode_to_file
from finetune.evaluation.fingerprints import file_versions
from finetune.evaluation.progress import Progress
from finetune.evaluation.streaming import Scorer
from finetune.kept import Records
from finetune.step import LossWeights
from ttt import TTTLMModel, block_streaming

logger = logging.getLogger(__name__)


class PositionRun:
    """Fills `records` with the sums of each arm over each recording, by bins of position.

    A record: arm, recording (its `location`), its size_bytes, num_frames and version (of recording
    and transcript; of `carried` the donor's too), control (of `reset` after how many frames, of
    `carried` from which recording), and of each stream the lists `loss` (Σ w · CE), `weight` (Σ w),
    `nll` (Σ CE) and `count`, one entry a bin.

    Args:
        recordings: the usable ones; `missing` collects those that turn out not to be, and
            `not_finite` those of them that have no finite loss.
        folder: for the codes while it runs.
    """

    def __init__(
        self,
        model: TTTLMModel,
        codec: Codec,
        recordings: Sequence[Recording],
        *,
        arms: Sequence[str],
        reset_frames: int,
        bin_frames: int,
        max_frames: int | None,
        batch_size: int,
        block_frames: int,
        weights: LossWeights,
        records: Records,
        folder: Path,
    ) -> None:
        self.model = model
        self.codec = codec
        # Rows of a batch should be of like length; and what takes most memory should come first.
        self.recordings = sorted(recordings, key=lambda r: -r.duration_sec)
        self.arms = arms
        self.reset_frames = reset_frames
        self.weights = weights
        self.records = records
        self.folder = folder
        self.max_frames = max_frames
        self.bin_frames = bin_frames
        self.batch_size = batch_size
        self.block_frames = block_frames
        self.missing: dict[str, str] = {}
        self.not_finite: set[str] = set()
        # From what is shorter than that, TTT learns nothing that another one could start with.
        self.donors = long_enough(self.recordings, model.ttt_args.update_frames, self.max_frames)
        self._codes: dict[str, CodesFile] = {}

    def run(self) -> None:
        """Everything that `records` does not hold yet."""
        size = self.batch_size
        batches = [self.recordings[i : i + size] for i in range(0, len(self.recordings), size)]
        arms_of_batches = ((arm, batch) for batch in batches for arm in self.arms)
        work = [(arm, todo) for arm, batch in arms_of_batches if (todo := self._todo(arm, batch))]
        num_done = len(self.arms) * len(self.recordings) - sum(len(todo) for _, todo in work)
        if num_done:
            logger.info("position: %d results are there already", num_done)
        # Every recording is encoded once, those that others start from included.
        encoded = {r for arm, todo in work for r in todo} | {
            self._donor(r) for arm, todo in work if arm == "carried" for r in todo
        }
        passes = [*encoded, *(r for _, todo in work for r in todo)]
        progress = Progress("position", sum(map(self._estimated_frames, passes)))
        for arm, batch in work:
            self._run_arm(arm, batch, progress)

    def results(self) -> list[dict[str, Any]]:
        """The records of these recordings and arms; the file may hold others."""
        wanted = {self._key(arm, r) for arm in self.arms for r in self.recordings}
        return [record for record in self.records if _key_of(record) in wanted]

    def _todo(self, arm: str, batch: Sequence[Recording]) -> list[Recording]:
        done = {_key_of(record) for record in self.records}
        return [recording for recording in batch if self._key(arm, recording) not in done]

    def _key(self, arm: str, recording: Recording) -> tuple[Any, ...]:
        return (
            arm,
            recording.location,
            self._version(arm, recording),
            self._control(arm, recording),
        )

    def _version(self, arm: str, recording: Recording) -> str:
        used = [recording, self._donor(recording)] if arm == "carried" else [recording]
        return file_versions(*(path for r in used for path in r.files))

    def _control(self, arm: str, recording: Recording) -> Any:
        if arm == "reset":
            return self.reset_frames
        return self._donor(recording).location if arm == "carried" else None

    def _donor(self, recording: Recording) -> Recording:
        """The next one that is long enough: its state is what `recording` starts with in the arm
        `carried`, for which there are at least two such recordings."""
        index = self.recordings.index(recording) + 1
        following = self.recordings[index:] + self.recordings[:index]
        return next(donor for donor in following if donor in self.donors)

    def _estimated_frames(self, recording: Recording) -> int:
        return estimated_frames(recording, self.max_frames)

    def _run_arm(self, arm: str, batch: Sequence[Recording], progress: Progress) -> None:
        donors = [self._donor(r) for r in batch] if arm == "carried" else []
        for recording in dict.fromkeys([*batch, *donors]):
            self._read(recording, progress)
        readable = [r for r in batch if self._has_codes(r)]
        if arm == "carried":
            readable = [r for r in readable if self._has_codes(self._donor(r))]
        rows = [self._codes[r.location] for r in readable]
        if not rows:
            return
        # What is replaced while it is read counts as the earlier one, and is read again next time.
        versions = [self._version(arm, r) for r in readable]
        model = self.model
        switch = ttt.without_ttt(model) if arm == "off" else contextlib.nullcontext()
        sums = BinSums(model, len(rows), max(row.num_frames for row in rows), self.bin_frames)
        with switch, block_streaming(model, len(rows), self.block_frames):
            if arm == "carried":
                self._learn([self._codes[self._donor(r).location] for r in readable])
            reset = self.reset_frames if arm == "reset" else None
            for block in self._scorer(rows).score(reset_every_frames=reset):
                sums.add(block)
                progress.advance(int(block.is_target[:, 0].sum()), f"{arm}, {len(rows)} recordings")
        for row, recording in enumerate(readable):
            streams = sums.of_row(row, rows[row].num_frames)
            if (bin := first_not_finite(streams)) is not None:
                self._leave_out(recording, arm, bin)
                continue
            self.records.append(
                {
                    "arm": arm,
                    "recording": recording.location,
                    "size_bytes": recording.path.stat().st_size,
                    "version": versions[row],
                    "control": self._control(arm, recording),
                    "num_frames": rows[row].num_frames,
                    "streams": streams,
                }
            )

    def _leave_out(self, recording: Recording, arm: str, bin: int) -> None:
        start_sec = bin * self.bin_frames / FRAME_RATE_HZ
        text = f"{recording.origin}: loss is not finite at {start_sec:g} s (arm {arm})"
        self.missing.setdefault(recording.location, text)
        self.not_finite.add(recording.location)
        logger.warning("missing: %s", text)

    def _scorer(self, rows: Sequence[CodesFile]) -> Scorer:
        return Scorer(self.model, rows, weights=self.weights, block_frames=self.block_frames)

    def _learn(self, donors: Sequence[CodesFile]) -> None:
        """Leave what TTT learns from the donors as the state that all else starts from."""
        # Complete updates only: frames that wait for theirs would shift the recording's own.
        every = self.model.ttt_args.update_frames
        stops = [donor.num_frames // every * every for donor in donors]
        self._scorer(donors).learn(stops)
        state = ttt.get_state(self.model)
        self.model.reset_streaming()
        ttt.set_state(self.model, state)

    def _has_codes(self, recording: Recording) -> bool:
        return recording.location in self._codes

    def _read(self, recording: Recording, progress: Progress) -> None:
        """Have the codes of a recording, or note in `missing` why it cannot be read."""
        name, title = recording.location, recording.title
        if name in self._codes or name in self.missing:
            return
        try:
            self._codes[name] = encode_to_file(
                self.codec,
                recording,
                self.folder / f"{len(self._codes)}.codes",
                max_frames=self.max_frames,
                on_block=lambda num_frames: progress.advance(num_frames, f"encoding {title}"),
            )
        except FileProblem as problem:
            self.missing[name] = f"{recording.origin}: {problem}"
            logger.warning("missing: %s", self.missing[name])


def _key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("arm", "recording", "version", "control"))


def estimated_frames(recording: Recording, max_frames: int | None) -> int:
    """Return how many frames are read of a recording, by the length that its header tells."""
    num_frames = round(recording.duration_sec * FRAME_RATE_HZ)
    return min(num_frames, max_frames or num_frames)


def long_enough(
    recordings: Sequence[Recording], num_frames: int, max_frames: int | None
) -> list[Recording]:
    return [r for r in recordings if estimated_frames(r, max_frames) >= num_frames]


def frames_of(duration_sec: float | None) -> int | None:
    return None if duration_sec is None else max(1, round(duration_sec * FRAME_RATE_HZ))
