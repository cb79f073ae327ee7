"""Recordings to answer, and where the answers go: nothing that is read is written over."""

import logging
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from finetune.errors import UserError, counted
from finetune.kept import make_folder, refuse_to_replace
from finetune.safety import find_files
from finetune.serve.options import GenerateOptions

logger = logging.getLogger(__name__)

NOTHING_KEPT = "nothing of the answer is kept"
RECORDINGS = {".wav", ".flac", ".mp3", ".ogg", ".opus"}


@dataclass(frozen=True)
class Job:
    """A recording and where its answer goes; the words go beside it, as .json."""

    source: Path
    target: Path

    @property
    def transcript(self) -> Path:
        return self.target.with_suffix(".json")

    def part(self) -> "Job":
        """Return where a part of the answer goes that is all there is: under the first name that
        no whole answer has, and neither its sound nor its words would share."""
        for number in count(1):
            name = f"{self.target.stem}.interrupted{number}"
            part = Job(self.source, self.target.with_stem(name))
            if not part.target.exists() and not part.transcript.exists():
                return part
        raise AssertionError

    def kept_for(self, num_sec: float) -> str:
        """Return what is said of such a part when it is kept."""
        return (
            f"{num_sec:.1f} s of the answer are kept in {self.target}, and their words in "
            f"{self.transcript}"
        )


def list_jobs(options: GenerateOptions) -> list[Job]:
    """Return the recordings to answer, each with a file of its own for the answer.

    With `--missing` these are those that have no answer yet, and may be none.

    Raises:
        UserError: no recording there, several for one session, or files to write that would
            replace a recording, its transcript, or one another.
    """
    jobs = _found(options)
    if options.session is not None and len(jobs) > 1:
        raise UserError("--session: a session is one conversation; give one recording.")
    return jobs


def _found(options: GenerateOptions) -> list[Job]:
    if options.input_dir is not None:
        found = sorted(options.input_dir.rglob(options.input_name))
        if not found:
            raise UserError(f"--input_dir: no {options.input_name} in {options.input_dir}.")
        return _checked(options, [Job(path, path.with_name(options.output_name)) for path in found])
    assert options.audio is not None
    if options.audio.is_dir() and not options.prompt_sec:
        out = options.out or Path("output")
        if out.resolve() == options.audio.resolve():
            raise UserError(f"--out: {out} holds the recordings themselves; choose another folder.")
        if options.audio.resolve() in out.resolve().parents:
            raise UserError(
                f"--out: {out} lies in --audio: the next call would take these answers for "
                "recordings; choose a folder outside."
            )
        found, hidden = find_files(options.audio, RECORDINGS)
        if hidden:
            logger.warning("passed over %s, as %s", counted(len(hidden), "hidden file"), hidden[0])
        if not found:
            raise UserError(
                f"--audio: no recordings ({', '.join(sorted(RECORDINGS))}) in {options.audio}."
            )
        places = [out / path.relative_to(options.audio).with_suffix(".wav") for path in found]
        jobs = _checked(options, [Job(*each) for each in zip(found, places, strict=True)])
        try:
            for folder in {out, *(place.parent for place in places)}:
                make_folder(folder)
        except OSError as error:
            raise UserError(
                f"--out: {out} is to be a folder, for the answers to a folder, and cannot be made "
                f"({error.strerror}); choose another name."
            ) from None
        return jobs
    if options.audio.is_dir():
        raise UserError(
            f"--audio: {options.audio} is a folder, and --prompt_sec goes on with one recording; "
            "name a file."
        )
    out = options.out or Path("continuation.wav" if options.prompt_sec else "output.wav")
    if out.suffix != ".wav":
        raise UserError(f"--out: {out} must end in .wav, as the answer to one recording.")
    return _checked(options, [Job(options.audio, out)])


def _checked(options: GenerateOptions, jobs: list[Job]) -> list[Job]:
    """Return the jobs to do if no file to write replaces one that is read, or another, also through
    links, nor one of before."""
    recordings = {job.source.resolve() for job in jobs}
    # Of a link, the transcript may be beside the link or beside what it leads to.
    transcripts = {path.with_suffix(".json").resolve() for path in recordings} | {
        job.source.with_suffix(".json").resolve() for job in jobs
    }
    answered: dict[Path, Path] = {}
    for job in jobs:
        for path in _files_of(job):
            place = path.resolve()
            if place in recordings:
                raise UserError(
                    f"{path}, where an answer would go, is the recording itself; choose another "
                    "name."
                )
            if place in transcripts:
                raise UserError(
                    f"{path}, where the words of an answer would go, is the place of a "
                    "recording's transcript; choose another name."
                )
            if place in answered:
                raise UserError(
                    f"{answered[place]} and {job.source} would both be answered in {path}; "
                    "rename one of them."
                )
            if place.is_dir():
                raise UserError(f"{path}, where an answer would go, is a folder; rename it.")
            answered[place] = job.source
    others: list[tuple[str, Path | None]] = [("session", options.session)]
    others += [("report", output.path) for output in options.outputs()]
    for option, other in others:
        if other is not None and other.resolve() in recordings | transcripts | answered.keys():
            raise UserError(
                f"--{option}: {other} is a recording, an answer or the words of one; choose "
                "another name."
            )
    if options.missing:
        # Its words are written first: where the sound is, all is.
        to_do = [job for job in jobs if not job.target.exists()]
        some = f"of {len(jobs)} recordings"
        done = counted(len(jobs) - len(to_do), f"{some} has", f"{some} have")
        logger.info("%s an answer already", done)
        return to_do
    rest = ", --missing to answer the others alone" if len(jobs) > 1 else ""
    refuse_to_replace(
        [path for job in jobs for path in _files_of(job)],
        overwrite=options.overwrite,
        alternative=("--out" if options.input_dir is None else "--output_name") + rest,
    )
    return jobs


def _files_of(job: Job) -> list[Path]:
    return [job.target, job.transcript]
