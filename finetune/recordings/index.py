"""A folder of recordings becomes a JSONL: `moshi-ttt data index`."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.data import Sides, inspect_audio, shared_transcripts
from finetune.errors import UserError, counted
from finetune.kept import write_whole
from finetune.recordings.annotate import transcript_path
from finetune.recordings.files import json_lines, listed
from finetune.recordings.options import IndexOptions
from finetune.recordings.pairs import Pair, find_pairs, join, require_kept
from finetune.recordings.work import RecordingError, do_all
from finetune.safety import AUDIO_SUFFIXES, find_files, is_recording_name, path_problem, shown

Files = tuple[Path, ...]
"""A stereo file, or two mono files, Moshi's first."""
_LEAVE_OUT = "move it out of the folder"


def index_folder(options: IndexOptions) -> Iterator[str]:
    """Measure all recordings of a folder and list them in a JSONL. Yields lines to print.

    What cannot be read is named and left out. With `options.join`, pairs are joined first.

    Raises:
        UserError: nothing in the folder can be used.
    """
    folder, out = options.folder, options.jsonl
    problems: list[str] = []
    pairs: list[Pair] = []
    dialogues: Sequence[Files]
    if options.pair is None:
        paths, hidden = find_files(folder, AUDIO_SUFFIXES)
        if hidden:
            yield f"passed over {len(hidden)} hidden files ({hidden[0].name}, for example)"
        dialogues = [(path,) for path in paths]
    else:
        found = find_pairs(folder, options.pair, options.joined_dir, options.overwrite)
        pairs, problems = found.pairs, found.problems
        if others := found.others:
            files = counted(len(others), "audio file")
            yield f"passed over {files} that --pair does not name ({others[0].name}, for example)"
        dialogues = [(pair.left, pair.right) for pair in pairs]
    unnamed = _unusable_names(dialogues)
    problems += unnamed.values()
    dialogues = [files for files in dialogues if files not in unnamed]
    if options.join:
        pairs = [pair for pair in pairs if (pair.left, pair.right) not in unnamed]
        require_kept(pairs)
        done_all = list(do_all(join, pairs, title="joining"))
        problems += [each.problem for each in done_all if each.problem is not None]
        dialogues = [(each.job.joined,) for each in done_all if each.problem is None]
        if notes := [note for each in done_all for note in each.result or ()]:
            yield f"words that somebody has changed: {listed(notes)}"
    durations_sec: dict[Files, float] = {}
    for done in do_all(_duration_sec, dialogues, title="measuring"):
        if done.result is not None:
            durations_sec[done.job] = done.result
        else:
            problems.append(str(done.problem))
    if problems:
        yield f"left out {listed(problems)}"
    if not durations_sec:
        raise UserError(f"{folder} holds no recording that can be used; {out} is not written.")
    write_whole(out, json_lines(_lines(durations_sec, out)))
    total_sec = sum(durations_sec.values())
    yield f"wrote {out}: {counted(len(durations_sec), 'recording')}, {total_sec / 3600:.2f} h"
    quoted = shlex.quote(str(out))
    num_bare = sum(not transcript_path(files[0]).exists() for files in durations_sec)
    if num_bare:
        bare = counted(num_bare, "has", "have")
        yield f"next: {bare} no transcript (.json); moshi-ttt data annotate {quoted}"
    else:
        yield f"next: moshi-ttt data check {quoted}"


def _unusable_names(dialogues: Sequence[Files]) -> dict[Files, str]:
    """Return what is wrong with the names of dialogues, by their files."""
    paths = (path for files in dialogues for path in files)
    shared = shared_transcripts(((path, transcript_path(path)) for path in paths), _LEAVE_OUT)
    problems = {}
    for files in dialogues:
        found = [_name_problem(files), *map(shared.get, files)]
        if problem := next(filter(None, found), None):
            problems[files] = problem
    return problems


def _name_problem(files: Files) -> str | None:
    """Return why no JSONL can name a recording; None: one can."""
    for path in files:
        name = str(path.absolute())
        try:
            name.encode()
        except UnicodeEncodeError:
            return f"{shown(name)} is not called so in UTF-8, in which a JSONL is: rename it"
        if (wrong := path_problem(name)) is not None:
            return f"the path {wrong}"
    return None


def _duration_sec(files: Files) -> float:
    """Return the length of a dialogue. Raises `FileProblem` if it cannot be used."""
    if len(files) == 2:
        return _not_empty(files, Sides.of_two(*files).measure().duration_sec)
    info = inspect_audio(files[0], channels=(1, 2))
    if info.num_channels == 1:
        raise RecordingError(
            f"{files[0]} is mono: if each speaker has a file, --pair lists both; else put Moshi on "
            "the left and the user on the right of one file"
        )
    return _not_empty(files, info.duration_sec)


def _not_empty(files: Files, duration_sec: float) -> float:
    if duration_sec == 0:
        raise RecordingError(f"{files[0]} is empty: record or copy it again")
    return duration_sec


def _lines(durations_sec: dict[Files, float], out: Path) -> Iterator[dict[str, object]]:
    """Yield the lines of the JSONL, in the order of the names; paths start from its folder."""
    base = out.absolute().parent
    for files in sorted(durations_sec):
        names = [_name(path.absolute(), base) for path in files]
        named = dict(zip(("path", "user_path"), names, strict=False))
        yield {**named, "duration": round(durations_sec[files], 6)}


def _name(path: Path, base: Path) -> str:
    """Return the name of a file from `base` on; the whole path if it is elsewhere, or if a reader
    would take the short name for something else, such as `~a.wav` or `a:b.wav`."""
    if path.is_relative_to(base):
        name = path.relative_to(base).as_posix()
        if is_recording_name(name) and path_problem(name) is None:
            return name
    return str(path)
