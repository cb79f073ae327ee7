"""From composed dialogues to streams of codes, and where their answers lie."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.data import FRAME_RATE_HZ, Codec, TextEncoder, TimedTokens, text_stream
from finetune.spoken.bank import Bank
from finetune.spoken.dialogues import Dialogue, DialogueArgs, Exchange, is_held_out
from finetune.spoken.facts import KINDS
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ

_FRAME_SAMPLES = round(SAMPLE_RATE_HZ / FRAME_RATE_HZ)
GAINS = (0.6, 0.8)
"""The loudness of a speaker is drawn from here."""
_TAIL_SEC = 8.0
"""Longer than any utterance: the last may reach past a dialogue's end."""


class Answer(NamedTuple):
    """One question, as a row of integers. Frames of a dialogue; values as places in `KINDS`."""

    frame: int
    """Where the text stream has the value's token."""
    kind: int
    """The kind's place in `KINDS`."""
    value: int
    is_repeated: int
    """1: Moshi had repeated the fact; 0: only the user's audio had it."""
    distance_frames: int
    """From the fact's last mention to `frame`."""
    asked_frame: int
    """Where the question begins."""
    repeated_frame: int
    """Where Moshi's text first has the value, if `is_repeated`."""
    order: int
    """The fact's place in the order of telling."""
    is_held_out: int


NO_ANSWER = Answer(*[-1] * len(Answer._fields))


@dataclass
class EncodedDialogues:
    """Dialogues as codes."""

    text: Tensor
    """[D, T] int16."""
    codes: Tensor
    """[D, 16, T] uint8."""
    answers: Tensor
    """[D, Q, len(Answer)] int32, `NO_ANSWER` where a dialogue has fewer."""

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, rows: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the codes [B, 17, T] and answers [B, Q, len(Answer)] of some dialogues."""
        text, codes = (part[rows].to(device).long() for part in (self.text, self.codes))
        return torch.cat([text[:, None], codes], 1), self.answers[rows].to(device).long()


def frame_of(time_sec: float) -> int:
    """Return the frame that a word which starts at `time_sec` belongs to."""
    return int(time_sec * FRAME_RATE_HZ + 1e-9)


def value_tokens(text: TextEncoder) -> list[list[int]]:
    """Return the first token of each value, [kind][value]."""
    return [[text.tokenize(f"{v}.")[0] for v in kind.values] for kind in KINDS.values()]


def answer_of(question: Exchange, fact: Exchange, order: int, value_frame: int) -> Answer:
    """Return the row of a question whose value is at `value_frame`."""
    told = fact.fact
    assert told is not None and told == question.fact
    kinds = list(KINDS)
    return Answer(
        value_frame,
        kinds.index(told.kind),
        KINDS[told.kind].values.index(told.value),
        int(fact.is_repeated),
        value_frame - frame_of(fact.last_sec),
        frame_of(question.asked_sec),
        frame_of(fact.value_sec),
        order,
        int(is_held_out(told)),
    )


def text_of(bank: Bank, dialogue: Dialogue, num_frames: int, text: TextEncoder) -> np.ndarray:
    """Return Moshi's text stream of a dialogue, [T] int16."""
    words = [
        TimedTokens(
            (spoken.start_sec + word.start_sec) * FRAME_RATE_HZ,
            text.tokenize_often(word.text),
        )
        for spoken in dialogue.spoken
        if not spoken.is_user
        for word in bank.words[spoken.place]
    ]
    words.sort(key=lambda word: word.start_frames)
    stream = text_stream(
        words,
        num_frames,
        text_padding_id=text.text_padding_id,
        end_of_text_padding_id=text.end_of_text_padding_id,
    )
    return np.array(stream, dtype=np.int16)


def answers_of(dialogue: Dialogue, stream: np.ndarray, tokens: list[list[int]]) -> list[Answer]:
    """Return the questions of a dialogue whose value has a frame of its own in the text stream
    (where two words fall into one frame, the first has none)."""
    facts = [exchange for exchange in dialogue.exchanges if exchange.kind == "fact"]
    found = []
    for exchange in dialogue.exchanges:
        if exchange.kind != "question":
            continue
        order = next(i for i, fact in enumerate(facts) if fact.fact == exchange.fact)
        frame = frame_of(exchange.value_sec)
        if frame < len(stream):
            answer = answer_of(exchange, facts[order], order, frame)
            if stream[frame] == tokens[answer.kind][answer.value]:
                found.append(answer)
    return found


def mix(
    bank: Bank,
    dialogues: Sequence[Dialogue],
    args: DialogueArgs,
    rng: random.Random,
    sound_of: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Return how dialogues sound, float32 [D, 2, S]: Moshi, the user. Gains are drawn from `rng`.

    Args:
        sound_of: returns the samples at a place of the bank, on the device of the result; None:
            those of the bank.
    """
    sound_of = sound_of or bank.samples.__getitem__
    num_samples = args.num_frames * _FRAME_SAMPLES
    device = sound_of(dialogues[0].spoken[0].place).device
    mixed = torch.zeros(
        len(dialogues), 2, num_samples + round(_TAIL_SEC * SAMPLE_RATE_HZ), device=device
    )
    for row, dialogue in enumerate(dialogues):
        gains = [rng.uniform(*GAINS), rng.uniform(*GAINS)]
        for spoken in dialogue.spoken:
            sound, at = sound_of(spoken.place), spoken.start_samples
            mixed[row, int(spoken.is_user), at : at + len(sound)] += (
                sound.float() * gains[int(spoken.is_user)]
            )
    return mixed[..., :num_samples].clamp(-1, 1)


def encode(
    bank: Bank,
    dialogues: Sequence[Dialogue],
    args: DialogueArgs,
    codec: Codec,
    *,
    seed: int,
) -> Tensor:
    """Return Mimi's codes of both channels of all dialogues, [D, 16, T] uint8."""
    # On a CPU more at once take longer: 16 need 12 GB, which the system has to clear each time.
    at_once_frames = 16 * 800 if codec.device.type == "cuda" else 800
    batch = max(1, at_once_frames // args.num_frames)
    rng = random.Random(f"gains {seed}")
    codec.mimi.to(codec.device)

    @cache
    def on_device(place: int) -> Tensor:
        return bank.samples[place].to(codec.device)

    found = []
    for start in range(0, len(dialogues), batch):
        part = dialogues[start : start + batch]
        mixed = mix(bank, part, args, rng, on_device)
        with torch.no_grad(), codec.lock:
            codes = codec.mimi.encode(mixed.flatten(0, 1)[:, None])
        found.append(codes.view(len(part), -1, args.num_frames).to(torch.uint8).cpu())
    return torch.cat(found)
