"""Recordings in, answers out: many side by side, through the engine of calls."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from finetune.data import AudioReader, FileProblem, inspect_audio
from finetune.errors import UserError
from finetune.inference import load_for_inference, nonfinite_weights
from finetune.kept import WavWriter, require_room, write_whole
from finetune.serve.engine import Engine, Row, Samples, open_engine
from finetune.serve.options import GenerateOptions, reset_every_frames
from finetune.serve.progress import Progress
from finetune.serve.report import Report
from finetune.serve.session import Identity, identify, load_session, pack
from finetune.serve.session_file import SessionFile
from finetune.serve.targets import NOTHING_KEPT, Job
from finetune.serve.words import Words

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 2
_BLOCK_FRAMES = 125
"""Frames of a recording that are read at once: 10 s. Its length takes no memory."""


@dataclass
class Outcome:
    """Answers that were written, and recordings that could not be answered."""

    written: list[Path] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)
    """Reasons, by recording."""
    texts: dict[Path, str] = field(default_factory=dict)
    """Words that Moshi says, by recording."""
    unsaved: str = ""
    """What is to be said of a session that could not be kept where it was to be."""


def answer_recordings(
    options: GenerateOptions, jobs: list[Job], session: SessionFile | None = None
) -> Outcome:
    """Let Moshi listen to recordings and speak: see `finetune.cli.generate`.

    Args:
        jobs: as `list_jobs` finds them.
        session: the conversation that goes on, of one job.

    Raises:
        UserError: a wrong option or checkpoint. What is wrong with one of several recordings is in
            the outcome.
    """
    if not jobs:
        return Outcome()
    if session is not None:
        session.announce()
    model, codec = load_for_inference(options.checkpoint, options.device, options.base_precision)
    problem = nonfinite_weights(model)
    if problem is not None:
        raise UserError(f"--checkpoint: {options.checkpoint}: {problem}: there is nothing to hear.")
    torch.manual_seed(options.seed)
    max_users = min(options.batch_size, len(jobs))
    try:
        with open_engine(
            model,
            codec,
            max_users=max_users,
            temperature=options.temperature,
            text_temperature=options.text_temperature,
        ) as engine:
            return _Desk(engine, options, session).answer(jobs)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size: {max_users} recordings at once need more memory than the GPU has; "
            "give fewer."
        ) from None


class _Desk:
    """Gives recordings rows as rows become free."""

    def __init__(
        self, engine: Engine, options: GenerateOptions, session: SessionFile | None
    ) -> None:
        self.engine = engine
        self.options = options
        self.session = session
        self.outcome = Outcome()
        self.report = Report(engine, options.report) if options.report is not None else None
        folder = options.input_dir or options.audio
        assert folder is not None
        self.leave_out = f"move it out of {folder}" if folder.is_dir() else ""

    def answer(self, jobs: list[Job]) -> Outcome:
        waiting = iter(jobs)
        open_jobs: list[_Conversation] = []
        with Progress("answering", len(jobs)) as progress:
            try:
                while True:
                    while len(open_jobs) < len(self.engine.rows):
                        if (job := next(waiting, None)) is None:
                            break
                        if (begun := self._begin(job)) is not None:
                            open_jobs.append(begun)
                            progress.add_work(begun.num_frames)
                    if not open_jobs:
                        break
                    open_jobs = self._advance(open_jobs)
                    progress.advance(len(open_jobs), len(self.outcome.written))
            except KeyboardInterrupt:
                logger.info("%s", self._what_is_kept(len(jobs), open_jobs))
                raise
            finally:
                for each in open_jobs:
                    each.discard()
        if self.report is not None:
            self.report.write()
        return self.outcome

    def _what_is_kept(self, num_jobs: int, open_jobs: list["_Conversation"]) -> str:
        """Return what is to be said when somebody stops it, and keep what there is of one answer:
        it may be of an hour, and of several the next call makes those again that are missing."""
        num_written = len(self.outcome.written)
        said = f"interrupted; {num_written} of {num_jobs} answers are kept"
        if num_jobs == 1 and not num_written:
            session = ", and the session is as it was" if self.session is not None else ""
            begun = open_jobs[0].keep_part() if open_jobs else NOTHING_KEPT
            return f"interrupted; {begun}{session}"
        if self.options.overwrite:
            return f"{said}, and where others were before, these still are"
        how = "the same command" if self.options.missing else "with --missing the same command"
        return f"{said}: {how} goes on with the others"

    def _begin(self, job: Job) -> "_Conversation | None":
        use = self.options.ttt
        row = self.engine.join(ttt_on=use != "off", reset_every_frames=reset_every_frames(use))
        assert row is not None
        if self.session is not None and self.session.is_begun:
            load_session(self.session.path, self.engine, row, self._identity())
        if self.options.session_part == "memory" and not self.engine.model.ttt_layers:
            raise UserError(
                "--session_part: this checkpoint has no TTT, so there is no memory to keep; "
                "keep all."
            )
        try:
            begun = _Conversation(job, row, self.engine, self.options)
        except FileProblem as problem:
            self._give_up(job, row, problem.found_in_list(self.leave_out))
            return None
        except UserError as error:
            self._give_up(job, row, error)
            return None
        if self.report is not None:
            self.report.begin(row, str(job.source))
        return begun

    def _identity(self) -> Identity:
        return identify(self.engine.model, self.engine.codec, self.options.checkpoint)

    def _give_up(self, job: Job, row: Row, problem: FileProblem | UserError) -> None:
        logger.warning("%s", problem)
        self.outcome.problems[job.source] = str(problem)
        self.engine.leave(row)

    def _advance(self, conversations: list["_Conversation"]) -> list["_Conversation"]:
        """Take one frame of all; return those that go on."""
        frames: dict[int, Samples] = {}
        going = []
        for each in conversations:
            try:
                frames[each.row.index] = next(each.frames)
                going.append(each)
            except FileProblem as problem:
                each.discard()
                self._give_up(each.job, each.row, problem.found_in_list(self.leave_out))
        spoken = self.engine.step(frames)
        if self.report is not None:
            self.report.look([each.row for each in going])
        still = []
        for each in going:
            if each.row.index in spoken:
                said = spoken[each.row.index]
                if not said.healthy:
                    self._break_off(each)
                    continue
                each.write(said.audio, said.text_token)
            if each.is_done:
                self._finish(each)
            else:
                still.append(each)
        return still

    def _break_off(self, each: "_Conversation") -> None:
        each.discard()
        problem = FileProblem(
            f"{each.job.source}: the model computed NaN or infinity from "
            f"{each.num_written / each.rate_hz:.1f} s on",
            "there is no answer; use an earlier checkpoint",
        )
        self._give_up(each.job, each.row, problem)

    def _finish(self, each: "_Conversation") -> None:
        content = b""
        if self.session is not None:
            try:
                content = pack(self.engine, each.row, self._identity(), self.session.part)
            except UserError as error:
                each.discard()
                return self._give_up(each.job, each.row, error)
        unwritten = each.keep()
        if self.report is not None:
            self.report.end(each.row, each.words)
        if self.session is not None:
            job, num_frames = each.job, each.row.num_frames
            self.outcome.unsaved = self.session.keep(content, num_frames, job.target)
        if unwritten is not None:
            self._give_up(each.job, each.row, unwritten)
        else:
            self.engine.leave(each.row)
            self.outcome.written.append(each.job.target)
        self.outcome.texts[each.job.source] = " ".join(word for word, _, _ in each.words.done)


class _Conversation:
    """A recording that is being answered."""

    def __init__(self, job: Job, row: Row, engine: Engine, options: GenerateOptions) -> None:
        self.job, self.row = job, row
        self.options = options
        self.rate_hz = engine.codec.sample_rate_hz
        self.frame_samples = engine.frame_samples
        info = inspect_audio(job.source, channels=(1, 2))
        self.num_samples = -(-info.num_samples * self.rate_hz // info.sample_rate_hz)
        if not self.num_samples:
            raise FileProblem(f"recording {job.source} is empty", "record or copy it again")
        self.num_frames = -(-self.num_samples // self.frame_samples) + engine.lag_frames
        self.words = Words(engine.codec)
        # Its own: recordings are read in turns, and mp3 and Opus are decoded from their start.
        self._reader = AudioReader(job.source)
        self.frames = self._read()
        self.num_written = 0
        self._heard: list[Samples] = []
        self._unwritten: UserError | None = None
        """Why there is no answer to be heard: no room on the disk, most often."""
        # Before there is a file to write: a recording that cannot be read leaves none behind.
        try:
            next(self._blocks())
            channels = 2 if options.stereo else 1
            require_room(job.target, _SAMPLE_BYTES * channels * self.num_samples)
            self._file = WavWriter(job.target, self.rate_hz, channels)
        except (FileProblem, UserError):
            self._reader.close()
            raise

    @property
    def is_done(self) -> bool:
        return self.num_written == self.num_samples

    def write(self, audio: Samples, text_token: int) -> None:
        self.words.add(text_token)
        audio = audio[: self.num_samples - self.num_written]
        self.num_written += len(audio)
        if self.options.stereo:
            audio = np.stack([audio, self._heard.pop(0)[: len(audio)]], axis=1)
        if self._unwritten is None:
            try:
                self._file.write(audio)
            except UserError as error:
                self._unwritten = error
                self._file.discard()  # others need the room, and the words do

    def keep(self) -> UserError | None:
        """Put words and sound in their places, each only when it is whole; return what could not
        be."""
        self._reader.close()
        try:
            write_whole(self.job.transcript, self.words.transcript())
        except UserError as error:
            self._file.discard()
            return self._unwritten or error
        try:
            if self._unwritten is None:
                self._file.keep()
                return None
        except UserError as error:
            self._unwritten = error
        return UserError(f"{self._unwritten} The words are in {self.job.transcript}.")

    def keep_part(self) -> str:
        """Keep what there is so far, under a name that no whole answer has; return what is to be
        said of it."""
        if not self.num_written:
            return NOTHING_KEPT
        self.job = self.job.part()
        self._file.path = self.job.target
        unwritten = self.keep()
        if unwritten is not None:
            return f"the answer is not kept: {unwritten}"
        return self.job.kept_for(self.num_written / self.rate_hz)

    def discard(self) -> None:
        self._reader.close()
        self._file.discard()

    def _read(self) -> Iterator[Samples]:
        """The user's voice frame by frame; silence after its end."""
        left = self.num_frames
        for block in self._blocks():
            for start in range(0, len(block), self.frame_samples):
                frame = block[start : start + self.frame_samples]
                frame = np.pad(frame, (0, self.frame_samples - len(frame)))
                if self.options.stereo:
                    self._heard.append(frame)
                left -= 1
                yield frame
        for _ in range(left):
            yield np.zeros(self.frame_samples, dtype=np.float32)

    def _blocks(self) -> Iterator[Samples]:
        size = _BLOCK_FRAMES * self.frame_samples
        for start in range(0, self.num_samples, size):
            block = self._reader.read(start, size, self.rate_hz)
            yield self._user(block.numpy())

    def _user(self, block: np.ndarray) -> Samples:
        if len(block) == 1:
            return block[0]
        if self.options.user_channel == "mix":
            return block.mean(axis=0)
        return block[1 if self.options.user_channel == "right" else 0]
