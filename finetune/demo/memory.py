"""A small Moshi, with TTT and without, is asked for facts that its attention has lost.

The dialogues are new: composed, spoken and encoded here, of sentences and of pairs of name and
value that the model has not heard in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from finetune.data import FRAME_RATE_HZ, Codec
from finetune.inference import generate_codes
from finetune.serve import Words
from finetune.spoken import (
    KINDS,
    Bank,
    BankArgs,
    Dialogue,
    DialogueArgs,
    Fact,
    TimedWord,
    compose,
    in_window,
    mix,
    said_value,
)
from ttt import TTTLMModel

Arm = Literal["on", "off"]
ARMS: tuple[Arm, ...] = ("on", "off")
"""Whether TTT is used."""
Reply = Literal["repeated", "misheard", "silent"]
"""What Moshi said to a fact: its name and value; a value, but another, or of another name; none."""

# As the experiment speaks that trained this model, and reads what it says: `moshi-ttt recall`.
_AUDIO_TEMPERATURE = 0.8
_ANSWER_SEC = (0.64, 4.8)
"""From the beginning of a question: where its answer is looked for."""
_PAUSE_SEC = 0.8
"""Between two utterances of Moshi, at least."""
_ENCODED_AT_ONCE = 4
_CHANGE_EVERY_FRAMES = 8


@dataclass(frozen=True)
class Asked:
    """A question of a dialogue, and what Moshi answered."""

    fact: Fact
    told_sec: float
    """When the last mention of the fact ended."""
    asked_sec: float
    replies: dict[Arm, Reply]
    """To the fact, when it was told."""
    said: dict[Arm, str | None]
    """The first value of the right kind that Moshi said in the time for the answer."""

    def is_right(self, arm: Arm) -> bool:
        """Return whether the value that Moshi said is the fact's."""
        return self.said[arm] == self.fact.value


@dataclass(frozen=True)
class Shown:
    """The dialogue that is shown as a whole."""

    user: list[tuple[float, str]]
    """When the user begins to say what."""
    moshi: dict[Arm, list[tuple[float, str]]]
    """Likewise."""
    told_sec: list[tuple[float, Fact]]
    """When the user begins to tell which fact."""
    audio: dict[Arm, Tensor]
    """[2, S]: left Moshi, right the user."""
    change_sec: list[float]
    changes: dict[int, list[float]]
    """By layer: ‖S‖ / ‖W0‖ at each of these times, with TTT."""


@dataclass(frozen=True)
class Memory:
    """The result of all dialogues."""

    asked: list[list[Asked]]
    """By dialogue."""
    shown: Shown
    """The first dialogue."""
    reach_sec: float
    """How far back attention carries anything."""
    num_values: int
    """Among which a guess would choose."""

    def count(self, arm: Arm, reply: Reply | None = None) -> tuple[int, int]:
        """Return how many questions were answered rightly, and how many there are: of all facts,
        or of those to which Moshi had said this."""
        chosen = [a for each in self.asked for a in each if reply in (None, a.replies[arm])]
        return sum(a.is_right(arm) for a in chosen), len(chosen)

    def share(self, arm: Arm) -> float:
        """Return the share of all questions that were answered rightly."""
        right, total = self.count(arm)
        return right / max(1, total)


@torch.no_grad()
def remember(
    model: TTTLMModel,
    codec: Codec,
    *,
    num_dialogues: int,
    seed: int = 0,
    args: DialogueArgs | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Memory:
    """Have new dialogues with the model, each with TTT and without at the same time.

    Args:
        model: of `example/memory`, in eval mode.
        args: of the dialogues; None: as long as those that the model was trained on.
        say: is told what begins.

    Raises:
        UserError: espeak-ng is not installed.
    """
    args = args or DialogueArgs()
    # Only the few hundred utterances of these dialogues are spoken.
    bank = Bank(BankArgs(), lazy=True)
    say(f"{num_dialogues} new dialogues of {args.num_frames / FRAME_RATE_HZ:.0f} s are spoken")
    dialogues = [
        compose(bank, args, "eval", random.Random(f"memory {seed} {index}"))
        for index in range(num_dialogues)
    ]
    codes, user_audio = _heard(bank, dialogues, args, codec, seed)
    say("Moshi hears them and speaks, with TTT and without")
    changes = _Changes(model)
    torch.manual_seed(seed)
    own = torch.full((2 * num_dialogues, 1 + model.dep_q, args.num_frames), model.zero_token_id)
    said = generate_codes(
        model,
        torch.cat([own.to(codes.device), codes.repeat(2, 1, 1)], 1).to(model.device),
        prompt_frames=0,
        temperature=_AUDIO_TEMPERATURE,
        text_temperature=0.0,
        ttt_rows=(torch.arange(2 * num_dialogues) < num_dialogues).to(model.device),
        after_step=changes.look,
    )
    rows: dict[Arm, Tensor] = dict(zip(ARMS, said.split(num_dialogues), strict=True))
    words: dict[Arm, list[list[TimedWord]]] = {
        arm: [_words(codec, row[0]) for row in rows[arm]] for arm in ARMS
    }
    voices = codec.decode(torch.stack([rows[arm][0, 1:] for arm in ARMS])).cpu()
    num_samples = min(voices.shape[-1], len(user_audio))
    first = dialogues[0]
    shown = Shown(
        user=list(_user_turns(bank, first)),
        moshi={arm: utterances(words[arm][0]) for arm in ARMS},
        told_sec=[
            (exchange.start_sec, exchange.fact)
            for exchange in first.exchanges
            if exchange.kind == "fact" and exchange.fact is not None
        ],
        audio={
            arm: torch.stack([voice[0, :num_samples], user_audio[:num_samples]])
            for arm, voice in zip(ARMS, voices, strict=True)
        },
        change_sec=changes.times_sec,
        changes=changes.by_layer,
    )
    asked = [
        list(_asked(dialogue, {arm: words[arm][index] for arm in ARMS}))
        for index, dialogue in enumerate(dialogues)
    ]
    values = {len([v for k, v in bank.args.values if k == kind]) for kind in bank.args.kinds}
    return Memory(asked, shown, args.reach_frames / FRAME_RATE_HZ, min(values))


def _heard(
    bank: Bank, dialogues: Sequence[Dialogue], args: DialogueArgs, codec: Codec, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the user's codes [D, 8, T], and how the first dialogue's user sounds, [S]."""
    rng = random.Random(f"memory gains {seed}")
    codes, first = [], None
    codec.mimi.to(codec.device)
    for start in range(0, len(dialogues), _ENCODED_AT_ONCE):
        user = mix(bank, dialogues[start : start + _ENCODED_AT_ONCE], args, rng)[:, 1:]
        first = user[0, 0] if first is None else first
        with codec.lock:
            codes.append(codec.mimi.encode(user.to(codec.device)))
    assert first is not None
    return torch.cat(codes), first


class _Changes:
    """The change of the first row's fast weights from where they started, over time."""

    def __init__(self, model: TTTLMModel) -> None:
        self.layers = {index: layer for index, layer in model.ttt_layers.items()}
        self.start_norms = {index: layer.start_norm() for index, layer in self.layers.items()}
        self.times_sec: list[float] = []
        self.by_layer: dict[int, list[float]] = {index: [] for index in self.layers}
        self._num_frames = 0

    def look(self) -> None:
        """Take down what one more frame has left."""
        self._num_frames += 1
        if self._num_frames % _CHANGE_EVERY_FRAMES:
            return
        self.times_sec.append(self._num_frames / FRAME_RATE_HZ)
        for index, layer in self.layers.items():
            change = layer.stream_change(self.start_norms[index])
            self.by_layer[index].append(change[0].item())


def _words(codec: Codec, tokens: Tensor) -> list[TimedWord]:
    words = Words(codec)
    for token in tokens.tolist():
        words.add(token)
    words.close()
    return words.done


def utterances(words: Sequence[TimedWord]) -> list[tuple[float, str]]:
    """Return what is said between two pauses, and when it begins."""
    found: list[tuple[float, str]] = []
    last_end_sec = float("-inf")
    for word, start_sec, end_sec in words:
        if start_sec - last_end_sec > _PAUSE_SEC:
            found.append((start_sec, word))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {word}")
        last_end_sec = end_sec
    return found


def _user_turns(bank: Bank, dialogue: Dialogue) -> Iterator[tuple[float, str]]:
    for spoken in sorted(dialogue.spoken, key=lambda spoken: spoken.start_samples):
        if spoken.is_user:
            text = " ".join(word.text for word in bank.words[spoken.place])
            yield spoken.start_sec, text


def _asked(dialogue: Dialogue, words: dict[Arm, list[TimedWord]]) -> Iterator[Asked]:
    after, before = _ANSWER_SEC
    exchanges = dialogue.exchanges
    told = {}
    for fact, following in pairwise(exchanges):
        if fact.kind == "fact" and fact.fact is not None:
            window = (fact.start_sec + after, following.start_sec + after)
            replies = {arm: _reply(fact.fact, words[arm], window) for arm in ARMS}
            told[fact.fact] = fact.last_sec, replies
    questions = [exchange for exchange in exchanges if exchange.kind == "question"]
    for question, following in pairwise([*questions, None]):
        assert question is not None and question.fact is not None
        # An answer ends where that to the next question begins.
        next_sec = float("inf") if following is None else following.asked_sec
        last_sec, replies = told[question.fact]
        window = question.asked_sec + after, min(question.asked_sec + before, next_sec + after)
        said = {
            arm: said_value(
                " ".join(word for word, _, _ in in_window(words[arm], *window)), question.fact.kind
            )
            for arm in ARMS
        }
        yield Asked(question.fact, last_sec, question.asked_sec, replies, said)


def _reply(fact: Fact, words: Sequence[TimedWord], window: tuple[float, float]) -> Reply:
    """Return what is said in the utterances that begin in a window."""
    first_sec, end_sec = window
    text = " ".join(text for at_sec, text in utterances(words) if first_sec <= at_sec < end_sec)
    if said_value(text, fact.kind) == fact.value and fact.name in text:
        return "repeated"
    return "misheard" if any(said_value(text, kind) for kind in KINDS) else "silent"
