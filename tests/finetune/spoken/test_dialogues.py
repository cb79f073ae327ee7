"""Dialogues with facts, and new ones out of their segments. Speech is a hum of the right length."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from finetune.data import TextEncoder
from finetune.spoken import KINDS, NAMES, Answer, BankArgs, DialogueArgs, EncodedDialogues
from finetune.spoken import bank as bank_module
from finetune.spoken.bank import Bank
from finetune.spoken.codes import answers_of, frame_of, mix, text_of, value_tokens
from finetune.spoken.dialogues import Dialogue, compose, is_held_out
from finetune.spoken.facts import Fact
from finetune.spoken.recombine import Pool, Silence, recombine
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ
from finetune.spoken.speech import Speech, Voice, Word
from finetune.spoken.tokenizer import train_tokenizer

SEC_A_WORD = 0.3
ARGS = DialogueArgs(num_frames=800, num_facts=4, reach_frames=100)
BANK = BankArgs(num_voices=2, kinds=("thing", "place"), num_fillers=(12, 12))


def hum(text: str, voice: Voice) -> Speech:
    words = text.split()
    times = [(SEC_A_WORD * i, SEC_A_WORD * (i + 0.8)) for i in range(len(words))]
    samples = np.full(round(SEC_A_WORD * len(words) * SAMPLE_RATE_HZ), 0.1)
    return Speech(samples, tuple(Word(w, *t) for w, t in zip(words, times, strict=True)))


@pytest.fixture(scope="module")
def bank() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "synthesize", hum)
        yield Bank(BANK)


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    proto = train_tokenizer(BANK)
    return TextEncoder(sentencepiece.SentencePieceProcessor(model_proto=proto))


def composed(bank: Bank, split: Any, count: int) -> list[Dialogue]:
    return [compose(bank, ARGS, split, random.Random(f"{split} {i}")) for i in range(count)]


def encoded(bank: Bank, dialogues: Sequence[Dialogue], text: TextEncoder) -> EncodedDialogues:
    """Codes that say which dialogue and frame they are of."""
    streams = np.stack([text_of(bank, d, ARGS.num_frames, text) for d in dialogues])
    codes = torch.zeros(len(dialogues), 16, ARGS.num_frames, dtype=torch.uint8)
    codes[:, 0] = torch.arange(len(dialogues))[:, None]
    codes[:, 1] = torch.arange(ARGS.num_frames) // 256
    codes[:, 2] = torch.arange(ARGS.num_frames) % 256
    rows = torch.full((len(dialogues), ARGS.num_facts, len(Answer._fields)), -1)
    for row, dialogue in enumerate(dialogues):
        for place, answer in enumerate(answers_of(dialogue, streams[row], value_tokens(text))):
            rows[row, place] = torch.tensor(answer)
    return EncodedDialogues(torch.from_numpy(streams), codes, rows.int())


def answers(spoken: EncodedDialogues) -> list[tuple[int, Answer]]:
    places = (spoken.answers[..., 0] >= 0).nonzero().tolist()
    return [(row, Answer(*spoken.answers[row, place].tolist())) for row, place in places]


def test_each_fact_is_asked_for_once_beyond_the_reach_of_attention(bank: Bank) -> None:
    orders = []
    for dialogue in composed(bank, "train", 40):
        told = [e for e in dialogue.exchanges if e.kind == "fact"]
        asked = [e for e in dialogue.exchanges if e.kind == "question"]
        assert len(told) == ARGS.num_facts
        facts = [e.fact for e in told]
        assert len({f.name for f in facts if f}) == len({f.value for f in facts if f}) == len(told)
        assert len({e.fact for e in asked}) == len(asked)
        for question in asked:
            fact = told[facts.index(question.fact)]
            assert frame_of(question.value_sec) - frame_of(fact.last_sec) > ARGS.reach_frames
        orders.append([facts.index(e.fact) for e in asked])
    assert np.mean([len(order) for order in orders]) > ARGS.num_facts - 0.5
    # Asked in the order told, "the oldest fact not yet asked for" would be right.
    assert sum(order == sorted(order) for order in orders) < len(orders) / 3


def test_some_pairs_are_told_in_evaluation_alone(bank: Bank) -> None:
    def pairs(split: str) -> set[Fact]:
        found = composed(bank, split, 60)
        return {e.fact for d in found for e in d.exchanges if e.fact is not None}

    assert not any(map(is_held_out, pairs("train")))
    share = np.mean([is_held_out(fact) for fact in pairs("eval")])
    assert 0.1 < share < 0.25
    for kind in KINDS:
        for name in NAMES:
            facts = [Fact(kind, name, value) for value in KINDS[kind].values]
            assert sum(map(is_held_out, facts)) == 2


def test_answers_are_where_the_text_has_the_value(bank: Bank, text: TextEncoder) -> None:
    spoken = encoded(bank, composed(bank, "eval", 12), text)
    tokens = value_tokens(text)
    found = answers(spoken)
    assert len(found) > 30
    for row, answer in found:
        token = tokens[answer.kind][answer.value]
        assert spoken.text[row, answer.frame] == token
        said = (spoken.text[row] == token).nonzero().flatten().tolist()
        assert said == ([answer.repeated_frame] if answer.is_repeated else []) + [answer.frame]
        assert answer.asked_frame < answer.frame


def test_recombined_dialogues_keep_facts_and_their_answers(bank: Bank, text: TextEncoder) -> None:
    dialogues = composed(bank, "train", 120)
    pool = Pool(encoded(bank, dialogues, text), dialogues, value_tokens(text))
    made = recombine(pool, ARGS, 40, seed=1)
    again = recombine(pool, ARGS, 40, seed=1)
    assert torch.equal(made.codes, again.codes) and torch.equal(made.answers, again.answers)
    assert not torch.equal(made.codes, recombine(pool, ARGS, 40, seed=2).codes)
    tokens = value_tokens(text)
    sources = []
    for row, answer in answers(made):
        token = tokens[answer.kind][answer.value]
        assert made.text[row, answer.frame] == token
        assert answer.distance_frames > ARGS.reach_frames and not answer.is_held_out
        if answer.is_repeated:
            assert made.text[row, answer.repeated_frame] == token
        # Text and codes are of the same frame of the same dialogue.
        dialogue, high, low = made.codes[row, :3, answer.frame].tolist()
        assert pool.text[dialogue, 256 * high + low] == token
        sources.append((made.codes[row, 0, answer.asked_frame].item(), dialogue))
    assert len(sources) > 80
    # A question and its value are drawn apart: else its codes would tell what was answered once.
    assert np.mean([question == value for question, value in sources]) < 0.5
    assert len({tuple(row.tolist()) for row in made.codes[:, 0]}) == 40


def test_longer_talks_have_the_questions_at_their_end(bank: Bank, text: TextEncoder) -> None:
    dialogues = composed(bank, "train", 60)
    pool = Pool(encoded(bank, dialogues, text), dialogues, value_tokens(text))
    made = recombine(pool, ARGS, 4, seed=0, filler_frames=1500)
    assert made.text.shape == (4, 2300)
    assert all(answer.distance_frames > 1500 for _, answer in answers(made)) and answers(made)


def test_talks_to_train_on_have_questions_at_all_distances(bank: Bank, text: TextEncoder) -> None:
    dialogues = composed(bank, "train", 60)
    pool = Pool(encoded(bank, dialogues, text), dialogues, value_tokens(text))
    made = recombine(pool, ARGS, 16, seed=0, filler_frames=2400, spread=True)
    distances = [answer.distance_frames for _, answer in answers(made)]
    assert len(distances) > 0.9 * 16 * ARGS.num_facts
    assert np.quantile(distances, 0.1) < 600 and np.quantile(distances, 0.9) > 2000


def test_pauses_and_talk_that_moshi_does_not_answer(bank: Bank, text: TextEncoder) -> None:
    dialogues = composed(bank, "train", 60)
    spoken, tokens = encoded(bank, dialogues, text), value_tokens(text)
    silence = Silence(text.text_padding_id, np.full((8, 800), 255, np.uint8))
    pool = Pool(spoken, dialogues, tokens, silence)
    made = recombine(pool, ARGS, 16, seed=0)
    silent = made.codes == 255
    moshi, user = silent[:, :8].all(1), silent[:, 8:].all(1)
    assert 0.02 < user.float().mean() < moshi.float().mean() < 0.4
    assert (made.text[moshi] == text.text_padding_id).all() and moshi[user].all()
    # Facts and answers are as they were.
    found = answers(made)
    assert len(found) > 40
    for row, answer in found:
        assert made.text[row, answer.frame] == tokens[answer.kind][answer.value]
        assert not moshi[row, answer.frame] and answer.distance_frames > ARGS.reach_frames
        if answer.is_repeated:
            assert made.text[row, answer.repeated_frame] == tokens[answer.kind][answer.value]
    even = recombine(Pool(spoken, dialogues, tokens), ARGS, 16, seed=0)
    assert not (even.codes[:, :8] == 255).all(1).any()


def test_questions_that_interrupt_moshi(bank: Bank, text: TextEncoder) -> None:
    dialogues = composed(bank, "train", 60)
    spoken, tokens = encoded(bank, dialogues, text), value_tokens(text)
    spoken.codes[:, 8:11] = spoken.codes[:, :3]
    silence = Silence(text.text_padding_id, np.full((8, 800), 255, np.uint8))
    made = recombine(Pool(spoken, dialogues, tokens, silence), ARGS, 24, seed=0)
    moshi, user = made.codes[:, :3].int(), made.codes[:, 8:11].int()
    is_over = (moshi[:, 0] != user[:, 0]) & (moshi[:, 0] != 255) & (user[:, 0] != 255)
    places = is_over.nonzero().tolist()
    # Moshi's text is that of what it speaks of.
    for row, frame in places:
        dialogue, high, low = moshi[row, :, frame].tolist()
        assert made.text[row, frame] == spoken.text[dialogue, 256 * high + low]
    interrupting = [
        answer
        for row, answer in answers(made)
        if is_over[row, answer.asked_frame : answer.asked_frame + 3].any()
    ]
    # It is never before a question, and it has ended before the answer.
    frames = {
        (row, frame)
        for row, answer in answers(made)
        for frame in range(answer.asked_frame - 3, answer.frame)
    }
    # (The last question's answer may lie behind the end.)
    end = {row: answer.frame for row, answer in answers(made)}
    assert all((row, frame) in frames for row, frame in places if frame < end[row])
    assert not any(is_over[row, answer.frame] for row, answer in answers(made))
    assert 0.15 < len(interrupting) / len(answers(made)) < 0.5


def test_talks_too_short_for_their_facts_are_refused() -> None:
    assert DialogueArgs().problems() == []
    assert "do not fit" in dataclasses.replace(ARGS, num_frames=150).problems()[0]


def test_a_bank_that_speaks_when_it_is_asked_sounds_the_same(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[tuple[Voice, str]] = []

    def count_and_hum(text: str, voice: Voice) -> Speech:
        spoken.append((voice, text))
        return hum(text, voice)

    monkeypatch.setattr(bank_module, "synthesize", count_and_hum)
    lazy = Bank(BANK, lazy=True)
    assert not spoken
    (whole,), (few,) = composed(bank, "eval", 1), composed(lazy, "eval", 1)
    sounds = [mix(each, [d], ARGS, random.Random(0)) for each, d in ((bank, whole), (lazy, few))]
    assert torch.equal(*sounds) and sounds[0].abs().max() > 0
    assert few.exchanges == whole.exchanges
    # Each once, and only those that are needed.
    assert len(spoken) == len({*spoken}) == len(lazy.samples) < len(bank.samples) / 2
