"""The scripted user: what it says is where the script says, and the same on every run."""

import hashlib
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from forked import Program

from finetune.errors import UserError
from finetune.spoken import KINDS, Talk, TalkOptions, make_talk
from finetune.spoken.talk import FORMAT, SAMPLE_RATE_HZ

SHORT = TalkOptions(distances_sec=(10.0, 25.0), num_facts=3)


def audio_of(talk: Talk) -> np.ndarray:
    return np.concatenate([*talk.blocks(1920)])[: talk.num_samples]


@pytest.fixture(scope="module")
def talk() -> Talk:
    return make_talk(SHORT, 1, seed=7)


@pytest.fixture(scope="module")
def audio(talk: Talk) -> np.ndarray:
    return audio_of(talk)


def level(audio: np.ndarray, start_sec: float, stop_sec: float) -> float:
    part = audio[round(start_sec * SAMPLE_RATE_HZ) : round(stop_sec * SAMPLE_RATE_HZ)]
    return float(np.sqrt(np.mean((part / 32768) ** 2)))


def test_facts_and_questions_are_heard_where_they_are_said_to_be(
    talk: Talk, audio: np.ndarray
) -> None:
    for span in [told.span for told in talk.facts] + [asked.span for asked in talk.questions]:
        start_sec, stop_sec = span.sec
        assert level(audio, start_sec, stop_sec) > 0.02
        assert level(audio, start_sec, start_sec + 0.3) > 0.005
        assert level(audio, stop_sec - 0.3, stop_sec) > 0.005
        assert level(audio, start_sec - 0.4, start_sec) < 1e-3
    for asked in talk.questions:
        start_sec, stop_sec = asked.window.sec
        assert (start_sec, stop_sec - start_sec) == (asked.span.sec[1], pytest.approx(4.0))
        assert level(audio, start_sec + 0.1, stop_sec) < 1e-3, "the user waits for the answer"
        # From the end of the fact to the end of its question.
        assert start_sec - asked.told.sec[1] == pytest.approx(asked.distance_sec, abs=1e-3)
    assert audio.dtype == np.int16 and abs(audio).max() < 32767


def test_each_fact_is_asked_for_once_and_nothing_else_tells_it(talk: Talk) -> None:
    facts = [told.fact for told in talk.facts]
    assert len({fact.name for fact in facts}) == len({fact.value for fact in facts}) == 3
    asked = [question.fact for question in talk.questions]
    assert len({*asked}) == 2 and {*asked} <= {*facts}
    said = [*talk.utterances()]
    assert [u.text for u in said if u.role == "fact"] == [fact.sentence for fact in facts]
    assert [u.text for u in said if u.role == "question"] == [fact.question for fact in asked]
    fillers = [u.text for u in said if u.role == "filler"]
    assert fillers
    for fact in facts:
        assert not any(fact.name in text or fact.value in text for text in fillers)
    for one, other in pairwise(said):
        assert one.span.stop < other.span.start
    # The values of the facts that are left, at the first question: all.
    assert talk.questions[0].oldest == facts[0].value
    assert talk.questions[0].newest == facts[-1].value


def test_the_first_talk_of_format_2_is_what_it_was() -> None:
    """Results of others are compared with ours by format and seed: another script needs another
    `FORMAT`."""
    assert FORMAT == 2
    talk = make_talk(TalkOptions(), 0, seed=0)
    assert [told.fact.sentence for told in talk.facts] == [
        "Diana likes oranges.", "Sophie likes horses.", "Nora likes violins.",
        "Alice likes mushrooms.", "George likes cheese.", "Robert likes dolphins.",
        "Martin likes flowers.", "Felix likes pancakes.",
    ]  # fmt: skip
    assert [(asked.fact.name, asked.distance_sec) for asked in talk.questions] == [
        ("Felix", 10), ("Martin", 30), ("Alice", 60), ("Sophie", 120), ("Nora", 240),
        ("Robert", 480),
    ]  # fmt: skip
    assert (talk.voice.name, talk.voice.pitch, talk.voice.words_per_min) == ("en-us+m2", 42, 157)
    assert [said.text for said in islice(talk.utterances(), 16)][8:] == [
        "Can you add two and five?",
        "What does Felix like?",
        "Whose is the green box in the kitchen?",
        "Thank you, I found it in the kitchen.",
        "What does Martin like?",
        "Can you add seven and three?",
        "What do you get for four and five together?",
        "What does Alice like?",
    ]


def test_talks_go_through_kinds_and_voices() -> None:
    options = TalkOptions(distances_sec=(10.0,), num_facts=1)
    talks = [make_talk(options, index, seed=0) for index in range(4)]
    assert [talk.kind for talk in talks] == ["thing", "place", "number", "thing"]
    assert len({talk.voice.name for talk in talks}) == 4
    for talk in talks:
        assert talk.facts[0].fact.value in KINDS[talk.kind].values
    other = make_talk(options, 0, seed=1)
    assert other.facts[0].fact != talks[0].facts[0].fact


def test_another_process_says_the_same_bytes(audio: np.ndarray) -> None:
    """Also with another seed of Python's hashes, and on another number of threads."""
    program = (
        "import hashlib, torch\nfrom finetune.spoken import TalkOptions, make_talk\n"
        "torch.set_num_threads(2)\n"
        "digest = hashlib.sha256()\n"
        "talk = make_talk(TalkOptions(distances_sec=(10.0, 25.0), num_facts=3), 1, seed=7)\n"
        "for block in talk.blocks(1000): digest.update(block.tobytes())\n"
        "print(digest.hexdigest(), hash('a talk'))"
    )
    output, _ = Program(program).communicate(timeout=100)
    said, hashed = output.split()
    assert int(hashed) != hash("a talk")
    padded = np.concatenate([audio, np.zeros(-len(audio) % 1000, np.int16)])
    assert said == hashlib.sha256(padded.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TalkOptions(num_facts=2), "--num_facts: 2 facts cannot be asked for at 6 distances"),
        (
            TalkOptions(distances_sec=tuple(map(float, range(10, 23)))),
            "12 facts cannot be asked for at 13",
        ),
        (
            TalkOptions(distances_sec=(10.0, 11.0, 12.0)),
            "--distances_sec: there is no room for these questions: each takes about 7 s",
        ),
        (TalkOptions(voices=("en-us+m3", "en-nowhere")), "no voice named 'en-nowhere'"),
    ],
)
def test_what_cannot_be_said_is_a_message(options: TalkOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_talk(options, 1, seed=0)


def kilobytes(key: str) -> int:
    """Of this process, from the system."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key))


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_a_minute() -> None:
    """Its audio alone would be 173 MB."""
    talk = make_talk(TalkOptions(distances_sec=(10.0, 3600.0), num_facts=4), 0, seed=0)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    num_blocks = sum(1 for _ in talk.blocks(1920))
    assert num_blocks == -(-talk.num_samples // 1920) > 3600 * 12.5
    assert kilobytes("VmHWM") - before < 40_000
