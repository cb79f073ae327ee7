"""Recordings to answer, and where the answers go: nothing that is read is written over."""

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.serve.options import GenerateOptions

RECORDINGS = {".wav", ".flac", ".mp3", ".ogg", ".opus"}


@dataclass(frozen=True)
class Job:
    """A recording and where its answer goes; the words go beside it, as .json."""

    source: Path
    target: Path


def list_jobs(options: GenerateOptions) -> list[Job]:
    """Return the recordings to answer, each with a file of its own for the answer.

    Raises:
        UserError: no recording there, or answers that would replace a recording or one another.
    """
    if options.input_dir is not None:
        if not options.input_dir.is_dir():
            raise UserError(f"--input_dir: there is no folder {options.input_dir}.")
        found = sorted(options.input_dir.rglob(options.input_name))
        if not found:
            raise UserError(f"--input_dir: no {options.input_name} in {options.input_dir}.")
        return _checked([Job(path, path.with_name(options.output_name)) for path in found])
    assert options.audio is not None
    if options.audio.is_dir() and not options.prompt_sec:
        out = options.out or Path("output")
        if out.resolve() == options.audio.resolve():
            raise UserError(f"--out: {out} holds the recordings themselves; choose another folder.")
        found = sorted(p for p in options.audio.iterdir() if p.suffix.lower() in RECORDINGS)
        if not found:
            raise UserError(
                f"--audio: no recordings ({', '.join(sorted(RECORDINGS))}) in {options.audio}."
            )
        jobs = _checked([Job(path, out / f"{path.stem}.wav") for path in found])
        out.mkdir(parents=True, exist_ok=True)
        return jobs
    out = options.out or Path("continuation.wav" if options.prompt_sec else "output.wav")
    if out.suffix != ".wav" or not out.absolute().parent.is_dir():
        raise UserError(f"--out: {out} must be a .wav file in a folder that exists.")
    if not options.audio.is_file():
        raise UserError(f"--audio: there is no file {options.audio}; correct the path.")
    return _checked([Job(options.audio, out)])


def _checked(jobs: list[Job]) -> list[Job]:
    """Return the jobs if no answer replaces a recording or another answer, also through links."""
    sources = {job.source.resolve() for job in jobs}
    by_target: dict[Path, Path] = {}
    for job in jobs:
        target = job.target.resolve()
        if target in sources:
            raise UserError(
                f"{job.target}, where an answer would go, is the recording itself; choose another "
                "name."
            )
        if target in by_target:
            raise UserError(
                f"{by_target[target]} and {job.source} would both be answered in {job.target}; "
                "rename one of them."
            )
        by_target[target] = job.source
    return jobs
