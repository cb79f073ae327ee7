"""Talks as files, for any model that listens and speaks, and the scores of its answers.

In the folder: `recall_audio.json`, which says how it was made, and of each talk a folder with
`input.wav`, what the user says, and `meta.json`, what is asked and when. A model's answer goes
beside them: `output.json`, its words with their times, or `output.txt`, a line for each question.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from finetune.config import FOLDER, POSITIONAL, WRITABLE, WRITABLE_FOLDER, FilePath, Prefix, Seed
from finetune.errors import UserError
from finetune.kept import MARK, Kept, Output, WavWriter, mark_of, require_room
from finetune.report import markdown_lines
from finetune.safety import read_text
from finetune.spoken.answers import (
    BASELINES,
    Json,
    example_table,
    guessing_text,
    question_json,
    recall_tables,
    score_text,
    score_words,
    summarize_recall,
)
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ
from finetune.spoken.talk import (
    FORMAT,
    Talk,
    TalkOptions,
    Utterance,
    make_talk,
    sound,
)

logger = logging.getLogger(__name__)

MANIFEST = "recall_audio.json"
META, INPUT = "meta.json", "input.wav"
SCORE = "recall-score"
_NEEDED = {"distance_sec", "kind", "fact", "question", "answer", "window_sec", "told_values"} | {
    *BASELINES
}
"""What a score needs of a question."""
_SAMPLE_BYTES = 2
_BLOCK_SAMPLES = 10 * SAMPLE_RATE_HZ


@dataclass(frozen=True)
class RecallAudioOptions:
    out: Annotated[FilePath, POSITIONAL, WRITABLE_FOLDER]
    """The folder to write to; new, or one that the same call has begun."""

    talk: Annotated[TalkOptions, Prefix("")] = field(default_factory=TalkOptions)

    seed: Seed = 0
    """The same seed gives the same bytes."""


@dataclass(frozen=True)
class RecallScoreOptions:
    folder: Annotated[FilePath, POSITIONAL, FOLDER]
    """A folder of recall-audio, with the answers in it."""

    answers: str = "output"
    """The answers' name: output.json, words with their times as generate writes them, or else
    output.txt, a line for each question."""

    out: Annotated[FilePath | None, WRITABLE] = None
    """A JSON file for all numbers and answers; null: none."""

    seed: Seed = 0
    """Seed of the bootstrap."""

    def outputs(self) -> list[Output]:
        return [Output(self.out, command=SCORE)] if self.out is not None else []


def write_recall_audio(options: RecallAudioOptions) -> Iterator[str]:
    """Write the talks of `options` as files, byte for byte the same on every run; what is there
    already from the same call is left as it is. Yields lines to print.

    Raises:
        UserError: the folder holds something else, or cannot be written; or see `make_talk`.
    """
    folder, wanted = options.out, options.talk
    num_talks, width = wanted.num_talks, max(3, len(str(wanted.num_talks - 1)))
    talks = [make_talk(wanted, index, options.seed) for index in range(num_talks)]
    to_make = [talk for talk in talks if not (_place_of(folder, talk, width) / META).exists()]
    require_room(folder, sum(_SAMPLE_BYTES * talk.num_samples for talk in to_make))
    _claim(folder, {"format": FORMAT, "seed": options.seed, **dataclasses.asdict(wanted)})
    num_there = 0
    for talk in talks:
        place = _place_of(folder, talk, width)
        if _is_whole(place):
            num_there += 1
            continue
        _write_talk(place, talk)
        logger.info("%s: %.0f s (%d of %d)", place, talk.duration_sec, talk.index + 1, num_talks)
    there = f", {num_there} of them were there already" if num_there else ""
    minutes = sum(talk.duration_sec for talk in talks) / 60
    yield f"{folder} holds {num_talks} talks{there}: {minutes:.0f} minutes of audio"
    quoted = shlex.quote(str(folder))
    yield f"next: moshi-ttt generate --checkpoint CHECKPOINT --input_dir {quoted}"
    yield f"then: moshi-ttt recall-score {quoted}"


def _place_of(folder: Path, talk: Talk, width: int) -> Path:
    return folder / f"{talk.index:0{width}d}"


def _claim(folder: Path, parameters: Json) -> None:
    """Write down what a folder is to hold, or find that it is so already."""
    manifest = Kept(folder / MANIFEST)
    known = manifest.read() if folder.is_dir() else None
    if known is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder} is there, and has no {MANIFEST}: it is not a folder of talks. Choose "
                "another folder."
            )
        manifest.write(parameters)
        return
    parameters = {key: _as_json(value) for key, value in parameters.items()}
    if known != parameters:
        names = [n for n in known.keys() | parameters.keys() if known.get(n) != parameters.get(n)]
        differ = ", ".join(f"{n} was {known.get(n)}, is {parameters.get(n)}" for n in sorted(names))
        raise UserError(f"{folder} holds other talks ({differ}). Choose another folder.")


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_whole(place: Path) -> bool:
    """Return whether a talk has been written to its end.

    Raises:
        UserError: it has, and is not what was written any more.
    """
    meta = Kept(place / META).read()
    if meta is None:
        return False
    audio = place / INPUT
    if not audio.is_file() or _sha256(audio) != meta.get("sha256"):
        raise UserError(
            f"{audio} is missing, or not what {place / META} tells of: delete {place / META}, and "
            "the talk is written again."
        )
    return True


def _write_talk(place: Path, talk: Talk) -> None:
    """Write the audio, and then what tells that it is whole."""
    said: list[Json] = []

    def noted() -> Iterator[Utterance]:
        for each in talk.utterances():
            said.append({"role": each.role, "text": each.text, "sec": each.span.sec})
            yield each

    file = WavWriter(place / INPUT, SAMPLE_RATE_HZ, channels=1)
    try:
        left = talk.num_samples
        for block in sound(noted(), talk.num_samples, _BLOCK_SAMPLES):
            file.write(block[:left].astype("int16"))
            left -= len(block)
        file.keep()
    finally:
        file.discard()
    Kept(place / META).write(
        {
            "format": FORMAT,
            "id": place.name,
            "voice": dataclasses.asdict(talk.voice),
            "duration_sec": talk.duration_sec,
            "sample_rate_hz": SAMPLE_RATE_HZ,
            "sha256": _sha256(place / INPUT),
            "facts": [{"fact": t.fact.sentence, "told_sec": t.span.sec} for t in talk.facts],
            "questions": [question_json(talk, question) for question in talk.questions],
            "utterances": said,
        }
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- scores ---------------------------------------------------------------------------------------


def score_recall(options: RecallScoreOptions) -> Iterator[str]:
    """Score the answers in a folder of talks. Yields lines to print: tables in Markdown.

    Raises:
        UserError: no talks are there, none has been answered, or an answer cannot be read.
    """
    metas = sorted(options.folder.glob(f"*/{META}"))
    if not metas:
        raise UserError(
            f"{options.folder} has no talks (*/{META}): make them by moshi-ttt recall-audio."
        )
    talks: dict[str, list[Json]] = {}
    answers: dict[str, list[Json]] = {}
    missing = []
    for path in metas:
        questions = _questions(path)
        found = _read_answers(path.parent, options.answers, questions)
        if found is None:
            missing.append(path.parent.name)
        else:
            talks[path.parent.name], answers[path.parent.name] = questions, found
    if not answers:
        raise UserError(
            f"{options.folder} has no answers: neither {options.answers}.json nor "
            f"{options.answers}.txt beside any {META}."
        )
    summary = summarize_recall(talks, {"model": answers}, seed=options.seed)
    if missing:
        yield f"{len(missing)} of {len(metas)} talks have no answers: {', '.join(missing[:10])}\n"
    for table in [*recall_tables(summary), example_table(summary)]:
        if table.rows:
            yield from [*markdown_lines(table), ""]
    yield guessing_text(summary)
    if options.out is not None:
        marked = {MARK: mark_of(SCORE), **summary}
        Kept(options.out).write({**marked, "answers": answers, "missing": missing})
        yield f"wrote {options.out}"


def _questions(path: Path) -> list[Json]:
    meta = Kept(path).read() or {}
    if meta.get("format") != FORMAT or not isinstance(meta.get("questions"), list):
        raise UserError(
            f"{path} is of another version (format {meta.get('format')}, not {FORMAT}): make the "
            "talks again, and their answers."
        )
    questions: list[Any] = meta["questions"]
    if not all(isinstance(each, dict) and each.keys() >= _NEEDED for each in questions):
        raise UserError(
            f"{path} has questions that lack some of {', '.join(sorted(_NEEDED))}: make the talks "
            "again."
        )
    return questions


def _read_answers(place: Path, name: str, questions: list[Json]) -> list[Json] | None:
    """Return the answers to a talk's questions; None: there are none."""
    from finetune.data import FileProblem, read_transcript

    timed, plain = place / f"{name}.json", place / f"{name}.txt"
    if timed.exists():
        try:
            words = [(w.text, w.start_sec, w.end_sec) for w in read_transcript(timed)]
        except FileProblem as problem:
            raise UserError(str(problem)) from None
        return [score_words(question, words) for question in questions]
    if not plain.exists():
        return None
    try:
        lines = read_text(plain).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{plain} cannot be read: {error}.") from None
    if len(lines) != len(questions):
        raise UserError(
            f"{plain} has {len(lines)} lines, and the talk {len(questions)} questions: write a "
            "line for each, an empty one where nothing was said."
        )
    return [score_text(question, line) for question, line in zip(questions, lines, strict=True)]
