"""Checks of the words of a recording. Each yields findings."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from finetune.data.inspection.findings import Finding, Subject
from finetune.data.text import FRAME_RATE_HZ
from finetune.data.transcripts import MAIN_SPEAKER, OTHER_SPEAKER, USER_SPEAKER, Word

_UNITS = {"milliseconds": 1e3, "samples at 24 kHz": 24e3, "samples at 16 kHz": 16e3}
_SHORTEST_WORD_SEC = 0.02
_TIMES_REMEDY = "check that times are in seconds, and that it is the transcript of this recording"
_OVERLAP_SEC = 0.1
_MAX_OVERLAPPING_SHARE = 0.2
_SENTENCE_WORDS = 4
_MAX_SENTENCE_SHARE = 0.05
_MAX_LOST_SHARE = 0.2


def main_speaker(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if there are words, but none of Moshi's."""
    if subject.other_words and not subject.main_words:
        speakers = sorted({word.speaker for word in subject.other_words}, key=_unlike_main)
        yield Finding(
            "no-main-speaker",
            "warning",
            f"{subject.text_name} holds words, but none of {MAIN_SPEAKER}, so Moshi says nothing "
            f"there (speakers: {', '.join(speakers[:3])})",
            _name_remedy(speakers),
        )


def other_spelling(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if some of Moshi's words have its name in another spelling than the rest."""
    others = subject.other_words if subject.main_words else []
    lost = [word for word in others if not _unlike_main(word.speaker)[0]]
    if lost:
        names = sorted({word.speaker for word in lost})
        yield Finding(
            "other-spelling",
            "warning",
            f"{_count(lost, subject.transcript.words)} in {subject.text_name} are of "
            f"{', '.join(map(repr, names[:3]))}, which is not {MAIN_SPEAKER!r}, first "
            f"{_quoted(lost[0])}, and are left out",
            _spelling_remedy(names[0]),
        )


def _unlike_main(speaker: str) -> tuple[bool, str]:
    """Return what names are sorted by: first what is the main speaker's but for capitals, spaces
    and marks."""
    return _letters(speaker) != _letters(MAIN_SPEAKER), speaker


def _letters(speaker: str) -> str:
    return "".join(filter(str.isalnum, speaker)).casefold()


def _spelling_remedy(speaker: str) -> str:
    return f"write {MAIN_SPEAKER!r} in place of {speaker!r}: names count with every character"


def _name_remedy(speakers: Sequence[str]) -> str:
    """Return what to do about words of these speakers, sorted, none of whom is the main one."""
    first, names = speakers[0], {*speakers} - {USER_SPEAKER, OTHER_SPEAKER}
    if not _unlike_main(first)[0]:
        return _spelling_remedy(first)
    # By these names Moshi is meant to be someone else: words are missing, no name is wrong.
    if not names:
        return (
            "if Moshi speaks there, add its words, with moshi-ttt data annotate --overwrite for "
            "example"
        )
    if len(names) == 1:
        return f"if {names.pop()!r} is Moshi, write {MAIN_SPEAKER!r} in place of it"
    return f"write {MAIN_SPEAKER!r} in place of the name that is Moshi's"


def times(subject: Subject) -> Iterator[Finding]:
    """Yield what is wrong with the times of the main speaker's words."""
    words = subject.main_words
    if not words:
        return
    if (unit := _other_unit(subject)) is not None:
        yield Finding(
            "other-time-units",
            "error",
            f"the times in {subject.text_name} go to {max(w.start_sec for w in words):g}, and the "
            f"recording lasts {subject.duration_sec:.3f} s: they seem to be {unit}",
            "write them in seconds",
        )
        return
    after = [w for w in words if subject.duration_sec and w.start_sec >= subject.duration_sec]
    if after:
        yield Finding(
            "words-after-the-end",
            "error" if len(after) == len(words) else "warning",
            f"{_count(after, words)} of {MAIN_SPEAKER} in {subject.text_name} start after the "
            f"recording's end at {subject.duration_sec:.3f} s, first {_quoted(after[0])}",
            _TIMES_REMEDY,
        )
    empty = [w for w in words if w.end_sec <= w.start_sec and w.text.strip()]
    if empty:
        yield Finding(
            "words-without-length",
            "error" if len(empty) == len(words) else "warning",
            f"{_count(empty, words)} of {MAIN_SPEAKER} in {subject.text_name} do not end after "
            f"they start, first {_quoted(empty[0])}, and are left out",
            "write an end for each word, for example the start of the next one",
        )
    early = [w for w in words if w.start_sec < 0]
    if early:
        yield Finding(
            "negative-times",
            "warning",
            f"{_count(early, words)} of {MAIN_SPEAKER} in {subject.text_name} start before 0 s, "
            f"first {_quoted(early[0])}, and are left out",
            _TIMES_REMEDY,
        )


def _other_unit(subject: Subject) -> str | None:
    """Return the unit that times in seconds are not in, but all of which would fit."""
    last, duration_sec = max(w.start_sec for w in subject.main_words), subject.duration_sec
    late = sum(w.start_sec >= duration_sec for w in subject.main_words)
    if not duration_sec or last < 10 * duration_sec or 2 * late < len(subject.main_words):
        return None
    lengths = sorted(w.end_sec - w.start_sec for w in subject.main_words)
    typical = lengths[len(lengths) // 2]
    # The unit in which the last word is nearest to the end, and in which words take some time.
    fitting = {
        name: last / each
        for name, each in _UNITS.items()
        if last / each <= duration_sec and typical / each >= _SHORTEST_WORD_SEC
    }
    return max(fitting, key=lambda name: fitting[name]) if fitting else None


def order(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if words are not in the order of time, or lie over one another."""
    words = subject.main_words
    unsorted = [w for before, w in _pairs(words) if w.start_sec < before.start_sec]
    if unsorted:
        yield Finding(
            "unsorted-words",
            "warning",
            f"{_count(unsorted, words)} of {MAIN_SPEAKER} in {subject.text_name} stand after words "
            f"that start later, first {_quoted(unsorted[0])}; they are sorted by start",
            "check that the file holds the words of one recording, in their order",
        )
    spoken = subject.spoken_words
    covered = [w for a, w in _pairs(spoken) if w.start_sec < a.end_sec - _OVERLAP_SEC]
    if len(covered) > _MAX_OVERLAPPING_SHARE * len(spoken):
        yield Finding(
            "overlapping-words",
            "warning",
            f"{_count(covered, spoken)} of {MAIN_SPEAKER} in {subject.text_name} start before the "
            f"word before has ended, first {_quoted(covered[0])}",
            "check that these are the words of one speaker, with times of their own",
        )


def sentences(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if entries are whole sentences."""
    spoken = subject.spoken_words
    long = [w for w in spoken if len(w.text.split()) >= _SENTENCE_WORDS]
    if len(long) > _MAX_SENTENCE_SHARE * len(spoken):
        yield Finding(
            "sentences-as-words",
            "warning",
            f"{_count(long, spoken, 'entries')} of {subject.text_name} are whole sentences, first "
            f"{_quoted(long[0])}: their text runs ahead of the voice and is cut off by the next",
            "make a transcript with an entry for each word, with its own times",
        )


def unused(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if there are keys or elements that mean nothing here."""
    if subject.transcript.unused:
        names = ", ".join(sorted(subject.transcript.unused)[:5])
        yield Finding(
            "unused-keys",
            "warning",
            f"{subject.text_name} holds what is not used here ({names})",
            "nothing need be done if training is to be without",
        )


def tokens(subject: Subject) -> Iterator[Finding]:
    """Yield findings about characters without a token, and tokens without a frame."""
    text = subject.text
    if text is None or not subject.spoken_words:
        return
    unknown_id = text.tokenizer.unk_id()
    found = [(word, text.tokenize_often(word.text)) for word in subject.spoken_words]
    unknown = [word for word, ids in found if unknown_id in ids]
    if unknown:
        yield Finding(
            "unknown-characters",
            "warning",
            f"{_count(unknown, subject.spoken_words)} in {subject.text_name} hold characters that "
            f"the tokenizer does not know, first {_quoted(unknown[0])}; they become token "
            f"{unknown_id}" + (", which means end-of-padding to Moshi" if unknown_id == 0 else ""),
            "write these words in characters that it knows, or leave them out",
        )
    # Words after the end are named by another check; without a known end, there are no frames.
    inside = [(word, ids) for word, ids in found if 0 <= word.start_sec < subject.duration_sec]
    num_tokens = sum(len(ids) for _, ids in inside)
    num_lost = num_tokens - _num_placed(inside, subject.duration_sec)
    if num_lost > _MAX_LOST_SHARE * num_tokens:
        yield Finding(
            "tokens-without-frame",
            "warning",
            f"{num_lost} of {num_tokens} text tokens ({num_lost / num_tokens:.0%}) of "
            f"{subject.text_name} find no frame, because the next word begins first",
            "check the times; where a language takes more than 12.5 tokens a second, use a "
            "tokenizer made for it",
        )


def _num_placed(found: Sequence[tuple[Word, list[int]]], duration_sec: float) -> int:
    """Tokens that go onto a frame by the rule of `text_stream`, over a whole recording."""
    num_frames = int(duration_sec * FRAME_RATE_HZ + 1e-6)
    starts = [int(word.start_sec * FRAME_RATE_HZ) for word, _ in found]
    ends = [*starts, num_frames][1:]
    return sum(
        max(0, min(len(ids), min(end, num_frames) - start))
        for (_, ids), start, end in zip(found, starts, ends, strict=True)
    )


def _pairs(words: Sequence[Word]) -> Iterator[tuple[Word, Word]]:
    return pairwise(words)


def _count(some: Sequence[Word], all_: Sequence[Word], noun: str = "words") -> str:
    return f"{len(some)} of {len(all_)} {noun}"


def _quoted(word: Word) -> str:
    text = word.text if len(word.text) <= 40 else word.text[:39] + "…"
    return f"{text!r} at {word.start_sec:g} s"


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    main_speaker,
    other_spelling,
    times,
    order,
    sentences,
    unused,
    tokens,
)
