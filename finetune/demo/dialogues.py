"""Synthetic stereo dialogues in the format that Moshi is trained on: left Moshi, right the user."""

from __future__ import annotations

import io
import json
import logging
import random
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from finetune.errors import UserError
from finetune.kept import is_free_folder, whole_folder
from finetune.spoken import SAMPLE_RATE_HZ, Speech, Voice, synthesize, texts

logger = logging.getLogger(__name__)

Speaker = Literal["moshi", "user"]

# Moshi has one voice, as the real one does; the user differs a little from dialogue to dialogue.
_MOSHI_VOICE = Voice("en-us+f3", pitch=55, pitch_range=50, words_per_min=160)
_USER_VOICE_NAME = "en-us+m3"
_LABELS: dict[Speaker, str] = {"moshi": "SPEAKER_MAIN", "user": "SPEAKER_USER"}

_LEAD_SEC = 0.3  # silence before the first word and after the last
_BACKCHANNEL_PROBABILITY = 0.2
_BACKCHANNEL_MIN_TURN_SEC = 2.0
_OVERLAP_PROBABILITY = 0.15
_MAX_OVERLAP_SEC = 0.3
_GAP_SEC = (0.15, 0.7)
_MIN_MIN_SEC = 4.0  # the shortest exchange must fit
_MAX_MISSES = 4  # so many turns may be too long for the time left before a dialogue ends
_FORMAT_VERSION = 1  # raise it when the same parameters give other files
_PARAMETERS_FILE = "parameters.json"


@dataclass(frozen=True)
class Turn:
    """Something that one of them says, and when it begins."""

    speaker: Speaker
    text: str
    speech: Speech
    start_sec: float

    @property
    def end_sec(self) -> float:
        return self.start_sec + self.speech.duration_sec


@dataclass(frozen=True)
class Dialogue:
    """`duration_sec` includes the silence at the end."""

    duration_sec: float
    turns: list[Turn]


def make_dialogues(
    out_dir: Path,
    *,
    num_dialogues: int = 60,
    min_sec: float = 20.0,
    max_sec: float = 40.0,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> bool:
    """Writes `num_dialogues` dialogues to `out_dir`, byte for byte the same on every run.

    Each is a stereo 16-bit wav of 24 kHz (left Moshi, right the user) of `min_sec` to `max_sec`
    seconds, with a `.json` of word times beside it: Moshi's words are `SPEAKER_MAIN`, the user's
    `SPEAKER_USER`. `train.jsonl` and `eval.jsonl` list them with paths relative to themselves; of
    the sentences in `eval.jsonl`, none occurs in training. The folder appears only when complete.

    Returns:
        Whether they were made now: a folder made by the same call before is left as it is.

    Raises:
        UserError: parameters out of range, espeak-ng not installed, or `out_dir` holds something
            else or cannot be written.
    """
    _check_parameters(num_dialogues, min_sec, max_sec, eval_fraction)
    parameters = {
        "format_version": _FORMAT_VERSION,
        "num_dialogues": num_dialogues,
        "min_sec": float(min_sec),
        "max_sec": float(max_sec),
        "eval_fraction": eval_fraction,
        "seed": seed,
    }
    out_dir = Path(out_dir).absolute()
    if _is_made_already(out_dir, parameters):
        logger.info("%s holds these dialogues already; nothing to do.", out_dir)
        return False
    num_eval = max(1, round(num_dialogues * eval_fraction))
    total_sec = 0.0
    splits: tuple[tuple[texts.Split, int], ...] = (
        ("train", num_dialogues - num_eval),
        ("eval", num_eval),
    )
    with whole_folder(out_dir) as partial:
        for split, count in splits:
            lines = []
            for index in range(count):
                rng = random.Random(f"{seed} {split} {index}")
                dialogue = compose_dialogue(rng, split, min_sec, max_sec)
                path = partial / f"{split}_{index:03d}.wav"
                path.write_bytes(_wav(mix(dialogue, rng)))
                path.with_suffix(".json").write_text(
                    json.dumps(_alignments(dialogue)) + "\n", encoding="utf-8"
                )
                lines.append(json.dumps({"path": path.name, "duration": dialogue.duration_sec}))
                total_sec += dialogue.duration_sec
            (partial / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (partial / _PARAMETERS_FILE).write_text(
            json.dumps(parameters, indent=2) + "\n", encoding="utf-8"
        )
    logger.info("Wrote %d dialogues, %.1f min, to %s.", num_dialogues, total_sec / 60, out_dir)
    return True


def compose_dialogue(
    rng: random.Random, split: texts.Split, min_sec: float, max_sec: float
) -> Dialogue:
    """Draws texts and times: a greeting, then topic after topic, until the time is filled."""
    user_voice = Voice(
        _USER_VOICE_NAME,
        pitch=rng.randint(35, 55),
        pitch_range=50,
        words_per_min=rng.randint(150, 175),
    )
    voices: dict[Speaker, Voice] = {"moshi": _MOSHI_VOICE, "user": user_voice}
    duration_sec = round(rng.uniform(min_sec, max_sec), 3)
    turns: list[Turn] = []
    end_sec = _LEAD_SEC
    previous: Speaker | None = None
    misses = 0
    while misses < _MAX_MISSES:
        exchange = texts.topic(rng, split) if turns else texts.greeting(rng, split)
        first: Speaker = rng.choice(("moshi", "user", "user"))  # users ask more than they answer
        for position, text in enumerate(exchange):
            speaker = first if position % 2 == 0 else _other(first)
            turn = _next_turn(rng, speaker, voices[speaker], text, end_sec, previous)
            if turn.end_sec + _LEAD_SEC > duration_sec:
                misses += 1
                break
            turns.append(turn)
            turns += _backchannel(rng, split, turn, voices[_other(speaker)])
            end_sec, previous = turn.end_sec, speaker
    return Dialogue(duration_sec, turns)


def mix(dialogue: Dialogue, rng: random.Random) -> np.ndarray:
    """The dialogue as int16 [S, 2] at 24 kHz, each speaker at a loudness of its own."""
    mixed = np.zeros((round(dialogue.duration_sec * SAMPLE_RATE_HZ), 2))
    gains = {"moshi": rng.uniform(0.6, 0.8), "user": rng.uniform(0.6, 0.8)}
    for turn in dialogue.turns:
        start = round(turn.start_sec * SAMPLE_RATE_HZ)
        samples = turn.speech.samples * gains[turn.speaker]
        column = 0 if turn.speaker == "moshi" else 1
        mixed[start : start + len(samples), column] += samples
    return np.rint(mixed.clip(-1, 1) * 32767).astype(np.int16)


def _other(speaker: Speaker) -> Speaker:
    return "user" if speaker == "moshi" else "moshi"


def _next_turn(
    rng: random.Random,
    speaker: Speaker,
    voice: Voice,
    text: str,
    end_sec: float,
    previous: Speaker | None,
) -> Turn:
    """Return what follows `previous`, who spoke until `end_sec`; nobody interrupts himself."""
    gap_sec = rng.uniform(*_GAP_SEC)
    if rng.random() < _OVERLAP_PROBABILITY and previous == _other(speaker):
        gap_sec = -rng.uniform(0.05, _MAX_OVERLAP_SEC)
    if previous is None:
        gap_sec = 0.0
    return Turn(speaker, text, synthesize(text, voice), round(end_sec + gap_sec, 3))


def _backchannel(rng: random.Random, split: texts.Split, turn: Turn, voice: Voice) -> list[Turn]:
    """Now and then, a word of the listener in the middle of `turn`."""
    long_enough = turn.speech.duration_sec > _BACKCHANNEL_MIN_TURN_SEC
    if not long_enough or rng.random() > _BACKCHANNEL_PROBABILITY:
        return []
    text = texts.backchannel(rng, split)
    start_sec = round(turn.start_sec + turn.speech.duration_sec * rng.uniform(0.35, 0.5), 3)
    return [Turn(_other(turn.speaker), text, synthesize(text, voice), start_sec)]


def _alignments(dialogue: Dialogue) -> dict[str, list]:
    words = [
        [
            word.text,
            [round(turn.start_sec + word.start_sec, 3), round(turn.start_sec + word.end_sec, 3)],
            _LABELS[turn.speaker],
        ]
        for turn in dialogue.turns
        for word in turn.speech.words
    ]
    return {"alignments": sorted(words, key=lambda word: word[1])}


def _wav(samples: np.ndarray) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(samples.astype("<i2").tobytes())
    return target.getvalue()


def _check_parameters(
    num_dialogues: int, min_sec: float, max_sec: float, eval_fraction: float
) -> None:
    if num_dialogues < 2:
        raise UserError(
            f"num_dialogues is {num_dialogues}; at least 2 are needed, one for each set."
        )
    if not _MIN_MIN_SEC <= min_sec <= max_sec:
        raise UserError(
            f"min_sec is {min_sec} and max_sec {max_sec}; "
            f"they must satisfy {_MIN_MIN_SEC} <= min_sec <= max_sec."
        )
    if not 0 < eval_fraction < 1 or max(1, round(num_dialogues * eval_fraction)) >= num_dialogues:
        raise UserError(f"eval_fraction is {eval_fraction}; it must leave dialogues for both sets.")


def _is_made_already(out_dir: Path, parameters: dict) -> bool:
    if not out_dir.exists() or is_free_folder(out_dir):
        return False
    parameters_file = out_dir / _PARAMETERS_FILE
    if parameters_file.is_file() and parameters_file.read_text(encoding="utf-8") == (
        json.dumps(parameters, indent=2) + "\n"
    ):
        return True
    raise UserError(
        f"{out_dir} exists and was not made by this call (its {_PARAMETERS_FILE} would say so). "
        "Choose another folder, or delete this one."
    )
