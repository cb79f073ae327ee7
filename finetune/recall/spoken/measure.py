"""A model's memory of spoken facts is measured, by teacher forcing and as it speaks freely."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data import FRAME_RATE_HZ, TextEncoder
from finetune.inference import generate_codes
from finetune.recall.measure import summarize
from finetune.recall.model import read_codes
from finetune.recall.spoken.presets import SpokenPreset
from finetune.recall.spoken.training import compute_losses, text_weights
from finetune.spoken import NAMES, Answer, EncodedDialogues, value_tokens
from ttt import TTTLMModel

FRAMES_AT_ONCE = 100_000
"""Of long talks, over all rows of a batch."""
FREE_TEMPERATURE = 0.8
"""Of Moshi's audio, when it speaks freely; its text is the likeliest."""
WINDOW_FRAMES = (8, 60)
"""From the beginning of a question: where an answer is looked for."""
REPEATED_FRAMES = (12, 25)
"""Before and after the frame in which Moshi should repeat a value: where it is looked for."""
NUM_CUT = 64
"""Dialogues that `without_the_past` is measured on."""

_COLUMN = {name: index for index, name in enumerate(Answer._fields)}
_NOTHING = -1


@dataclass(frozen=True)
class Judged:
    """Answers of a model: all [B, Q], on the CPU."""

    answers: Tensor
    """[B, Q, len(Answer)]."""
    is_right: Tensor
    """The value's token is the likeliest of all."""
    loss: Tensor
    """In nats."""

    def summary(self, chosen: Tensor | None = None) -> dict[str, Any]:
        """Return accuracy and loss, with intervals over dialogues: see `summarize`."""
        asked = self.column("frame") >= 0
        return summarize(self.is_right, asked if chosen is None else asked & chosen, self.loss)

    def column(self, name: str) -> Tensor:
        """Return a column of the answers, [B, Q]."""
        return self.answers[..., _COLUMN[name]]


def by_speaker(judged: Judged) -> dict[str, Any]:
    """Return summaries by who had said the value: Moshi too, or the user alone."""
    is_repeated = judged.column("is_repeated") == 1
    return {
        "all": judged.summary(),
        "moshi": judged.summary(is_repeated),
        "user": judged.summary(~is_repeated),
    }


@torch.no_grad()
def trained_length(
    model: TTTLMModel, data: EncodedDialogues, text: TextEncoder, preset: SpokenPreset
) -> dict[str, Any]:
    """Measure talks as long as in training, by who said the fact, by distance, and by whether the
    pair of name and value was ever told in training; and what else was learned."""
    weights = text_weights(preset, text, model.device)
    parts: list[Judged] = []
    text_loss, audio_loss, heard = [], [], []
    for rows in torch.arange(len(data)).split(preset.batch_size):
        codes, answers = data.batch(rows, model.device)
        losses = compute_losses(
            model, codes, answers, preset, weights, rows=min(preset.audio_rows, len(rows))
        )
        parts.append(Judged(answers.cpu(), losses.right.cpu(), losses.answers.cpu()))
        text_loss.append(losses.words.item())
        audio_loss.append(losses.audio.item())
        heard.append(losses.repeats.cpu())
    judged = _joined(parts)
    distances = judged.column("distance_frames")
    asked = judged.column("frame") >= 0
    edges = np.quantile(distances[asked].numpy(), [0, 1 / 3, 2 / 3, 1]).round()
    edges[-1] += 1
    is_held_out = judged.column("is_held_out") == 1
    repeats = torch.cat(heard)
    return {
        **by_speaker(judged),
        "known pairs": judged.summary(~is_held_out),
        "new pairs": judged.summary(is_held_out),
        "by_distance": {
            f"{low / FRAME_RATE_HZ:.0f} to {high / FRAME_RATE_HZ:.0f} s": {
                **judged.summary((distances >= low) & (distances < high)),
                "mean_distance_sec": (low + high) / 2 / FRAME_RATE_HZ,
            }
            for low, high in pairwise(edges.tolist())
        },
        "hearing": summarize(repeats == 1, repeats != _NOTHING),
        "words_loss": float(np.mean(text_loss)),
        "audio_loss": float(np.mean(audio_loss)),
    }


def _joined(parts: list[Judged]) -> Judged:
    return Judged(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("answers", "is_right", "loss"))
    )


@torch.no_grad()
def without_the_past(
    model: TTTLMModel, data: EncodedDialogues, preset: SpokenPreset, *, other: bool
) -> dict[str, Any]:
    """Ask every question of some dialogues after another past than that in which the fact was told.

    Up to as far before the question as attention reaches, the frames are left out (as if the state
    had been reset there) or, with `other`, are those of another dialogue.
    """
    count = min(NUM_CUT, len(data))
    reach, parts = preset.data.dialogues.reach_frames, []
    for index in range(count):
        codes, answers = data.batch(torch.tensor([index, (index + 1) % count]), torch.device("cpu"))
        own, answers = codes[0], answers[0]
        answers = answers[answers[:, _COLUMN["frame"]] >= 0]
        if not len(answers):
            continue
        rows, frames = [], []
        for answer in answers:
            start = max(0, int(answer[_COLUMN["asked_frame"]]) - reach)
            past = codes[1, :, :start] if other else own[:, :0]
            rows.append(torch.cat([past, own[:, start : int(answer[_COLUMN["frame"]]) + 1]], 1))
            frames.append(rows[-1].shape[1] - 1)
        longest = max(row.shape[1] for row in rows)
        padded = torch.stack([F.pad(row, (0, longest - row.shape[1]), value=-1) for row in rows])
        read = read_codes(model, padded.to(model.device))
        logits = model.forward_text(read[:, :, :-1])[1][:, 0].float().cpu()
        at = logits[torch.arange(len(rows)), torch.tensor(frames)]
        expected = own[0, answers[:, _COLUMN["frame"]]]
        judged = Judged(
            answers[None],
            (at.argmax(-1) == expected)[None],
            F.cross_entropy(at, expected, reduction="none")[None],
        )
        parts.append(_padded(judged, preset.data.dialogues.num_facts))
    return by_speaker(_joined(parts))


def _padded(judged: Judged, num_answers: int) -> Judged:
    more = num_answers - judged.is_right.shape[1]
    return Judged(
        F.pad(judged.answers, (0, 0, 0, more), value=-1),
        F.pad(judged.is_right, (0, more)),
        F.pad(judged.loss, (0, more)),
    )


@torch.no_grad()
def longer(model: TTTLMModel, data: EncodedDialogues) -> dict[str, Any]:
    """Measure long talks, each read in one pass, which computes what a stream does."""
    parts = []
    rows_at_once = max(1, FRAMES_AT_ONCE // data.text.shape[1])
    for rows in torch.arange(len(data)).split(rows_at_once):
        codes, answers = data.batch(rows, model.device)
        frames = answers[..., _COLUMN["frame"]].clamp(min=0)
        hidden = model._text_hidden(read_codes(model, codes)[:, :, :-1])
        at = hidden.gather(1, frames[..., None].expand(-1, -1, hidden.shape[2]))
        logits = model.text_linear(at).float()
        expected = codes[:, 0].gather(1, frames)
        loss = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none")
        right = logits.argmax(-1) == expected
        parts.append(Judged(answers.cpu(), right.cpu(), loss.view_as(expected).cpu()))
    judged = _joined(parts)
    distance = judged.column("distance_frames")[judged.column("frame") >= 0].double().mean().item()
    return {**by_speaker(judged), "mean_distance_sec": distance / FRAME_RATE_HZ}


def queue_accuracy(data: EncodedDialogues) -> float:
    """Return how often "the oldest fact not yet asked for" is right: what a model could reach that
    knows the order of telling, but not who is asked about."""
    right = total = 0
    for row in data.answers:
        rows = row[row[:, _COLUMN["frame"]] >= 0]
        waiting = list(range(len(row)))
        for answer in rows[rows[:, _COLUMN["frame"]].argsort()]:
            order = int(answer[_COLUMN["order"]])
            right += order == waiting[0]
            total += 1
            waiting.remove(order)
    return right / max(1, total)


@torch.no_grad()
def free(
    model: TTTLMModel, data: EncodedDialogues, text: TextEncoder, count: int
) -> tuple[dict[str, Any], Tensor]:
    """Let Moshi speak on its own, from the first frame of `count` dialogues, and read its answers
    from its text: the first value of the right kind after the question.

    Returns:
        What came out, and what Moshi said, [B, 1 + 8, T].
    """
    codes, answers = data.batch(slice(0, count), model.device)
    torch.manual_seed(0)
    said = generate_codes(
        model, codes, prompt_frames=0, temperature=FREE_TEMPERATURE, text_temperature=0.0
    ).cpu()
    answers, truth = answers.cpu(), codes.cpu()
    tokens = value_tokens(text)
    names = {text.tokenize(name)[0] for name in NAMES}
    shape = answers.shape[:2]
    right, named, silent, heard = (torch.full(shape, _NOTHING) for _ in range(4))
    for row, place in (answers[..., _COLUMN["frame"]] >= 0).nonzero().tolist():
        answer = Answer(*answers[row, place].tolist())
        values = tokens[answer.kind]
        start, end = (answer.asked_frame + frames for frames in WINDOW_FRAMES)
        window = said[row, 0, start:end].tolist()
        first = next((token for token in window if token in values), None)
        right[row, place] = int(first == values[answer.value])
        silent[row, place] = int(first is None)
        asked = [t for t in truth[row, 0, answer.asked_frame : answer.frame].tolist() if t in names]
        name = next((token for token in window if token in names), None)
        named[row, place] = int(bool(asked) and name == asked[-1])
        if answer.is_repeated:
            before, after = REPEATED_FRAMES
            start = max(0, answer.repeated_frame - before)
            around = said[row, 0, start : answer.repeated_frame + after].tolist()
            heard[row, place] = int(values[answer.value] in around)
    is_repeated = answers[..., _COLUMN["is_repeated"]] == 1
    is_asked = right != _NOTHING
    return {
        "moshi": summarize(right == 1, is_asked & is_repeated),
        "user": summarize(right == 1, is_asked & ~is_repeated),
        "right name": summarize(named == 1, is_asked),
        "right, if the name is": summarize(right == 1, named == 1),
        "no value": summarize(silent == 1, is_asked),
        "repeated rightly": summarize(heard == 1, heard != _NOTHING),
    }, said
