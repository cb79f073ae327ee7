"""Paired likelihood: of two recordings, which one does the model think likelier?

For sBLIMP, sWUGGY, spoken StoryCloze and their kin: a JSONL of
`{"good": "a.wav", "bad": "b.wav", "id": "17", "group": "agreement"}`. A mono recording is the
speech of one side of the conversation; the other side is silence, as Mimi encodes it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data import (
    AudioInfo,
    Codec,
    FileProblem,
    damaged,
    inspect_audio,
    parse_line,
    read_audio,
    read_transcript,
)
from finetune.errors import UserError
from finetune.evaluation.bin_sums import BinSums
from finetune.evaluation.codes import BLOCK_FRAMES, Silence
from finetune.evaluation.fingerprints import file_versions
from finetune.evaluation.progress import Progress
from finetune.evaluation.streaming import Scorer
from finetune.evaluation.tasks.pairs.options import PairOptions
from finetune.kept import Records
from finetune.safety import is_recording_name, path_problem, read_text
from finetune.step import LossWeights
from ttt import TTTLMModel, block_streaming
from ttt.options import abbreviated

logger = logging.getLogger(__name__)

_FORMAT = '{"good": "a.wav", "bad": "b.wav", "id": "17", "group": "agreement"}'
_LEAVE_OUT = "remove its line"
_UNWEIGHTED = LossWeights(text_padding=1.0, first_codebook=1.0)


@dataclass(frozen=True)
class Pair:
    """A pair is two recordings of which the model should find `good` likelier."""

    id: str
    group: str
    good: Path
    bad: Path


@dataclass
class CodesInMemory:
    """Int64 [1 + n_q, T]."""

    codes: Tensor

    @property
    def num_frames(self) -> int:
        return self.codes.shape[1]

    def read(self, start_frame: int, stop_frame: int) -> Tensor:
        return self.codes[:, start_frame:stop_frame]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL; `id` is the line's number where there is none, `group` is `all`.

    Raises:
        UserError: the file cannot be read or is empty, a line is malformed, or an id comes twice.
    """
    try:
        texts = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--pairs: cannot read {path}: {error}.") from None
    pairs: dict[str, Pair] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        pair = _parse(path, number, text)
        if pair.id in pairs:
            raise UserError(
                f"{path}:{number}: the id {abbreviated(repr(pair.id))} has come before."
            )
        pairs[pair.id] = pair
    if not pairs:
        raise UserError(f"--pairs: {path} is empty: it needs lines like {_FORMAT}.")
    return list(pairs.values())


def _parse(path: Path, number: int, text: str) -> Pair:
    try:
        fields = parse_line(text, {"good": "text", "bad": "text"})
    except ValueError as error:
        raise UserError(f"{path}:{number}: malformed line: {error}: expected {_FORMAT}.") from None
    good, bad = fields["good"], fields["bad"]
    for name in (good, bad):
        if (problem := path_problem(name)) is not None:
            raise UserError(f"{path}:{number}: the path {problem}.")
        if not is_recording_name(name):
            raise UserError(
                f"{path}:{number}: {name[:100]!r} leads out of the folder of {path.name}: put that "
                f"file above the recordings, or give absolute paths."
            )
    id, group = str(fields.get("id", number)), str(fields.get("group", "all"))
    return Pair(id, group, path.parent / good, path.parent / bad)


class PairScorer:
    """Fills `records` with the likelihood of every recording of the pairs, stream by stream.

    A record: wav, its version (of file and transcript) and num_frames, and of each stream its `nll`
    (Σ CE in nats) and `count`.
    """

    def __init__(
        self,
        model: TTTLMModel,
        codec: Codec,
        pairs: Sequence[Pair],
        *,
        options: PairOptions,
        batch_size: int,
        block_frames: int,
        records: Records,
    ) -> None:
        self.model = model
        self.codec = codec
        self.options = options
        self.batch_size = batch_size
        self.block_frames = block_frames
        self.records = records
        self.silence = Silence(codec)
        self.missing: dict[str, str] = {}
        self.wavs = list(dict.fromkeys(wav for pair in pairs for wav in (pair.good, pair.bad)))

    def run(self) -> None:
        """Everything that `records` does not hold yet."""
        done = {record["wav"] for record in self.results()}
        found: dict[Path, AudioInfo] = {}
        for wav in self.wavs:
            try:
                found[wav] = inspect_audio(wav, channels=(1, 2))
                if not found[wav].num_samples:
                    raise damaged(f"recording {wav} is empty")
            except FileProblem as problem:
                self.missing[str(wav)] = str(problem.found_in_list(_LEAVE_OUT))
        # Rows of a batch should be of like length.
        todo = sorted(
            (wav for wav in found if str(wav) not in done and str(wav) not in self.missing),
            key=lambda wav: found[wav].duration_sec,
        )
        num_done = sum(str(wav) in done for wav in self.wavs)
        if num_done:
            logger.info("pairs: %d of %d recordings are scored already", num_done, len(self.wavs))
        progress = Progress("pairs", len(todo), unit="recordings")
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            self._score({wav: found[wav] for wav in batch})
            progress.advance(len(batch))

    def results(self) -> list[dict[str, Any]]:
        """The records of these recordings; the file may hold others, or what a file once was."""
        versions = {str(wav): self._version(wav) for wav in self.wavs if wav.is_file()}
        return [r for r in self.records if versions.get(r["wav"]) == r["version"]]

    def _version(self, wav: Path) -> str:
        with_text = self.options.text == "transcript"
        return file_versions(*([wav, wav.with_suffix(".json")] if with_text else [wav]))

    def _score(self, batch: dict[Path, AudioInfo]) -> None:
        rows: dict[Path, CodesInMemory] = {}
        # What is replaced while it is read counts as the earlier one, and is read again next time.
        versions = {wav: self._version(wav) for wav in batch}
        for wav, info in batch.items():
            try:
                rows[wav] = CodesInMemory(self._encode(wav, info))
            except FileProblem as problem:
                self.missing[str(wav)] = str(problem.found_in_list(_LEAVE_OUT))
        if not rows:
            return
        model, block_frames = self.model, self.block_frames
        num_frames = max(row.num_frames for row in rows.values())
        sums = BinSums(model, len(rows), num_frames, num_frames)
        with block_streaming(model, len(rows), block_frames):
            scorer = Scorer(
                model, list(rows.values()), weights=_UNWEIGHTED, block_frames=block_frames
            )
            for block in scorer.score():
                sums.add(block)
        for index, (wav, row) in enumerate(rows.items()):
            streams = {
                stream: {"nll": parts["nll"][0], "count": parts["count"][0]}
                for stream, parts in sums.of_row(index, row.num_frames).items()
            }
            known = {"wav": str(wav), "version": versions[wav], "num_frames": row.num_frames}
            self.records.append({**known, "streams": streams})

    def _encode(self, wav: Path, info: AudioInfo) -> Tensor:
        """Int64 [1 + n_q, T]: text, Moshi, user.

        Raises:
            FileProblem: the recording, or a transcript that is wanted, cannot be read.
        """
        codec = self.codec
        rate_hz = codec.sample_rate_hz
        num_samples = -(-info.num_samples * rate_hz // info.sample_rate_hz)
        num_frames = -(-num_samples // codec.mimi.frame_size)
        block = BLOCK_FRAMES * codec.mimi.frame_size
        parts = (read_audio(wav, start, block, rate_hz) for start in range(0, num_samples, block))
        blocks = (F.pad(part, (0, block - part.shape[1])) for part in parts)
        encoded = torch.cat(
            [codes.cpu() for codes in codec.encode_blocks(blocks, BLOCK_FRAMES)], dim=2
        )
        encoded = encoded[:, :, :num_frames]
        if len(encoded) == 2:
            left, right = encoded
        else:
            speech, silence = encoded[0], self.silence.codes(num_frames)
            is_moshi = self.options.side == "moshi"
            left, right = (speech, silence) if is_moshi else (silence, speech)
        return codec.join(self._text(wav, num_frames), left, right)

    def _text(self, wav: Path, num_frames: int) -> Tensor:
        words = []
        if self.options.text == "transcript":
            words = read_transcript(wav.with_suffix(".json"))
        return torch.tensor(self.codec.text.stream(words, 0, num_frames))


def log_likelihood(record: Mapping[str, Any], options: PairOptions) -> float:
    """The score of a recording, in nats: −Σ over streams of weight · Σ CE, divided by the number of
    frames if `length_norm` is `mean`."""
    streams = record["streams"]
    total = (
        options.text_weight * streams["text"]["nll"]
        + options.first_codebook_weight * streams["first_codebook"]["nll"]
        + options.other_codebooks_weight * streams["other_codebooks"]["nll"]
    )
    return -total / (record["num_frames"] if options.length_norm == "mean" else 1)


def zerospeech_lines(
    pairs: Sequence[Pair], records: Iterable[Mapping[str, Any]], options: PairOptions
) -> list[str]:
    """`<id> <logprob>` of every recording that could be scored, as ZeroSpeech takes submissions.

    The id is the file's name without its ending, or its path where names come twice.
    """
    wavs = sorted({wav for pair in pairs for wav in (pair.good, pair.bad)})
    scores = {record["wav"]: log_likelihood(record, options) for record in records}
    is_unique = len({wav.stem for wav in wavs}) == len(wavs)
    return [
        f"{wav.stem if is_unique else wav.with_suffix('')} {scores[str(wav)]:.6f}"
        for wav in wavs
        if str(wav) in scores
    ]
