"""The memory that the demonstration shows, with the model that is shipped."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from rich.table import Table

from finetune.data import Codec
from finetune.demo import run_demo
from finetune.demo.memory import ARMS, Arm, Memory, _asked, remember, utterances
from finetune.demo.memory_report import (
    PICTURE_NAME,
    WIDTH,
    accuracy,
    answers,
    sound_name,
    transcripts,
    write_memory,
)
from finetune.errors import UserError
from finetune.inference import generate_codes, load_for_inference
from finetune.spoken import KINDS, NAMES, DialogueArgs, Fact
from finetune.spoken.dialogues import Dialogue, Exchange
from ttt import TTTLMModel, without_ttt

ROOT = Path(__file__).parents[3]
ARGS = DialogueArgs(num_frames=400, num_facts=3)
FACTS = {
    fact.sentence: fact
    for kind in KINDS
    for name in NAMES
    for value in KINDS[kind].values
    for fact in [Fact(kind, name, value)]
}


@pytest.fixture(scope="module")
def loaded() -> tuple[TTTLMModel, Codec]:
    return load_for_inference(ROOT / "example" / "memory", "cpu")


@pytest.fixture(scope="module")
def memory(loaded: tuple[TTTLMModel, Codec]) -> Memory:
    """A dialogue of half the length that the model was trained on."""
    return remember(*loaded, num_dialogues=1, seed=9, args=ARGS)


def printed(table: Table) -> str:
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_on_a_cpu_it_computes_in_float32(loaded: tuple[TTTLMModel, Codec]) -> None:
    model, _ = loaded
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def assert_known_with_ttt_alone(memory: Memory, num_asked: int) -> None:
    """At least three facts, beyond attention's reach, and all that it has repeated."""
    asked = [question for each in memory.asked for question in each]
    assert len(asked) == num_asked
    # The value is said a second after the question begins, and not before.
    assert all(a.asked_sec + 1.0 - a.told_sec > memory.reach_sec for a in asked)
    right, total = memory.count("on", "repeated")
    assert total >= 1 and right == total
    assert memory.count("on")[0] >= 3 and memory.count("off")[0] < memory.count("on")[0]


def test_what_moshi_was_told_it_knows_with_ttt_alone(memory: Memory) -> None:
    assert_known_with_ttt_alone(memory, num_asked=3)


@pytest.mark.slow
def test_it_knows_it_in_the_first_dialogue_of_the_demonstration(
    loaded: tuple[TTTLMModel, Codec],
) -> None:
    """Of the length that the model was trained on."""
    assert_known_with_ttt_alone(remember(*loaded, num_dialogues=1), num_asked=4)


@pytest.mark.slow
def test_in_several_talks_it_knows_nearly_all(loaded: tuple[TTTLMModel, Codec]) -> None:
    """Of the demonstration's 109 questions it answers 98 % rightly, and 3 % without TTT."""
    memory = remember(*loaded, num_dialogues=4)
    right, total = memory.count("on")
    assert total >= 15 and right >= 0.9 * total and memory.count("off")[0] <= 0.15 * total


def test_a_talk_without_a_question_has_no_answers() -> None:
    told = Exchange("fact", 0.0, Fact("thing", "Robert", "oranges"))
    dialogue = Dialogue(0, exchanges=[told, Exchange("filler", 5.0)])
    assert list(_asked(dialogue, {"on": [], "off": []})) == []


def test_rows_without_ttt_say_what_the_model_says_without_it(
    loaded: tuple[TTTLMModel, Codec],
) -> None:
    model, _ = loaded
    rng = torch.Generator().manual_seed(5)
    codes = torch.randint(256, (1, 17, 64), generator=rng).repeat(2, 1, 1)

    def said(rows: Any) -> torch.Tensor:
        # At temperature 0 it might say nothing to such noise, with TTT and without.
        torch.manual_seed(0)
        return generate_codes(
            model, codes, prompt_frames=0, temperature=0.8, text_temperature=0.0, ttt_rows=rows
        )

    mixed = said(torch.tensor([True, False]))
    with without_ttt(model):
        off = said(None)
    assert torch.equal(mixed[1], off[1])
    # Nothing is written before the first chunk of 32 frames ends.
    assert torch.equal(mixed[0, :, :30], off[0, :, :30]) and not torch.equal(mixed[0], off[0])


def test_both_transcripts_and_the_answers_fit_a_terminal(memory: Memory) -> None:
    for table in (transcripts(memory), answers(memory), accuracy(memory)):
        text = printed(table)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= WIDTH
        assert "with TTT" in text and "without TTT" in text
    lines = printed(transcripts(memory))
    told = (lines.count(" tells "), lines.count(" asks "))
    assert told == (ARGS.num_facts, len(memory.asked[0]))
    verdicts = printed(answers(memory))
    for arm in ARMS:
        for asked in memory.asked[0]:
            verdict = "right" if asked.said[arm] == asked.fact.value else "wrong"
            assert f"{asked.said[arm] or 'no answer'}: {verdict}" in verdicts
    assert f"{memory.share('on'):.0%}" in printed(accuracy(memory))


def test_sounds_and_a_picture_are_left(memory: Memory, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "memory"
    write_memory(memory, folder)
    heard = {}
    for arm in ARMS:
        heard[arm], rate = soundfile.read(folder / sound_name(arm))
        assert rate == 24_000 and heard[arm].shape == (ARGS.num_frames * 1920, 2)
        # Both speak.
        assert (np.abs(heard[arm]).max(0) > 0.05).all()
    assert np.array_equal(heard["on"][:, 1], heard["off"][:, 1])
    assert not np.array_equal(heard["on"][:, 0], heard["off"][:, 0])
    assert (folder / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    for change in memory.shown.changes.values():
        # Nothing before the first chunk ends; afterwards there is something.
        assert change[0] == 0 and change[-1] > 0


def test_an_utterance_ends_with_a_pause() -> None:
    words = [("Okay,", 1.0, 1.2), ("Laura", 1.9, 2.0), ("Yes.", 5.0, 5.1)]
    assert utterances(words) == [(1.0, "Okay, Laura"), (5.0, "Yes.")]


def test_without_the_model_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "example").mkdir()
    (tmp_path / "example/demo.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no example/memory/model\.safetensors here"):
        run_demo(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def found_in(memory: Memory, folder: Path, arm: Arm) -> list[tuple[bool, bool]]:
    """Whether a recognizer that knows all names and values hears those that are said, for each
    answer that is a whole fact."""
    from research.recall_voices import hear, recognizer

    recognizers = {kind: recognizer(kind) for kind in KINDS}
    sound, rate = soundfile.read(folder / sound_name(arm))
    found = []
    for at_sec, text in memory.shown.moshi[arm]:
        if fact := FACTS.get(text):
            piece = sound[round((at_sec - 0.4) * rate) : round((at_sec + 3.0) * rate), 0]
            words = hear(recognizers[fact.kind], (piece * 32767).astype(np.int16))
            found.append((fact.name.lower() in words, words[-1:] == [fact.value.lower()]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pocketsphinx") is None, reason="needs pocketsphinx")
def test_a_recognizer_hears_in_the_sound_what_the_text_says(
    loaded: tuple[TTTLMModel, Codec], tmp_path: Path
) -> None:
    """It understands Moshi's voice, encoded and decoded, in 5 names of 6 and 2 values of 3; a guess
    is right one time in 12."""
    memory = remember(*loaded, num_dialogues=1)
    write_memory(memory, tmp_path)
    found = np.array([pair for arm in ARMS for pair in found_in(memory, tmp_path, arm)])
    assert len(found) >= 8
    assert found.mean() > 0.25, found
