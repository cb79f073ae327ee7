"""Streams of codes in which facts recur: a key and its value, and much later the key again.

Everything is in Moshi's format: [B, 1 + codebooks, T] codes, text first, before delays. A fact is
two frames, key and value, and so is a question: the key again, and the answer, which the model is
to predict. Nothing but the fact tells the answer, as keys and values are paired anew in every
sequence, each key is asked for once, and fillers are other tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.recall.options import Variant

PADDING = 3
SILENCE = 0
"""Of all codebooks; in the text it is Moshi's end of padding, which does not occur here."""
FIRST_WORD = 4
FILLER_WORD_SHARE = 0.8
"""Of the text; the rest is padding."""
SPEECH_SHARE = 0.3
"""Of the blocks of frames outside of silence in which the codebooks hold anything but silence."""
SPEECH_BLOCK_FRAMES = 8
BURST_BLOCK_FRAMES = 64
BURST_SHARE = 0.6
"""Of the blocks of frames that are silent through and through, in filler of silence."""

Kind = Literal["trained", "old", "late", "rebound", "silence"]
KINDS: tuple[Kind, ...] = ("old", "late", "rebound", "silence")
"""What long streams test. `old`: facts at the very beginning. `late`: facts near the end, after a
long filler. `rebound`: facts at the beginning, of which every key gets a new value in the middle;
the newest counts. `silence`: as `old`, and most of the filler is bursts of silence."""


@dataclass(frozen=True)
class StreamArgs:
    """Parameters of the streams."""

    variant: Variant = "text"
    """Where facts and answers are. `text`: in the text. `audio`: in the first codebook. `joint`: a
    fact is one frame, its key in the text and its value in the first codebook. `segments`: one
    segment of the facts' total length is heard again, all streams of it, and its text is asked
    for from its second frame on."""

    num_frames: int = 256
    """T of a training sequence. Facts lie in its first quarter."""

    num_pairs: int = 12
    num_keys: int = 64
    num_values: int = 32
    num_fillers: int = 32
    num_codebooks: int = 8

    reach_frames: int = 30
    """How far attention carries anything: questions come after more than that."""

    @property
    def card(self) -> int:
        """Tokens of the text and of every codebook."""
        return FIRST_WORD + self.num_fillers + self.num_keys + self.num_values

    @property
    def text_card(self) -> int:
        return self.card

    @property
    def first_key(self) -> int:
        return FIRST_WORD + self.num_fillers

    @property
    def first_value(self) -> int:
        return self.first_key + self.num_keys

    @property
    def asked_stream(self) -> int:
        """The stream with the answers."""
        return 1 if self.variant in ("audio", "joint") else 0

    @property
    def num_answers(self) -> int:
        """Tokens that an answer may be; one of them is right by chance."""
        return self.num_keys if self.variant == "segments" else self.num_values

    @property
    def fact_streams(self) -> set[int]:
        """The streams with keys or values."""
        return {0, 1} if self.variant == "joint" else {self.asked_stream}

    @property
    def min_distance_frames(self) -> int:
        """Between a key and the key again, the least that attention does not reach over: when a key
        is read, the value's frame lies `distance - 1` back."""
        return self.reach_frames + 2

    def problems(self) -> list[str]:
        """Why no such streams can be made."""
        found = []
        facts, room = self.num_frames // 4, 2 * self.num_pairs
        questions = self.num_frames - facts - self.min_distance_frames
        if min(facts, questions) < room + 1:
            found.append(
                f"{self.num_pairs} facts and as many questions, each of two frames, do not fit "
                f"into {self.num_frames} frames with {self.min_distance_frames} between them"
            )
        if self.num_pairs > self.num_keys or (self.variant == "segments" and room > self.num_keys):
            found.append(f"{self.num_keys} keys are too few for {self.num_pairs} facts")
        return found


@dataclass(frozen=True)
class Streams:
    """A batch of streams, and where the answers are."""

    codes: Tensor
    """[B, 1 + codebooks, T]."""
    answers: Tensor
    """[B, Q], frames of the answers, which are `codes` there in the asked stream."""
    facts: Tensor
    """[B, Q], frames of the (newest) facts' keys."""
    fact_frames: int = 2
    """Of a fact, key and value."""

    @property
    def distances(self) -> Tensor:
        """[B, Q], frames from a fact's key to the key again."""
        return self.answers - 1 - self.facts

    def straddling(self, update_frames: int) -> Tensor:
        """[B, Q], whether an update of the fast weights falls between a fact's key and its value.

        A model reads the code of frame t at position t + 1; updates are after every
        `update_frames` positions.
        """
        first, last = self.facts + 1, self.facts + self.fact_frames
        return first // update_frames != last // update_frames


def draw(
    args: StreamArgs,
    *,
    batch: int,
    seed: int,
    kind: Kind = "trained",
    num_frames: int | None = None,
) -> Streams:
    """Streams of `num_frames` frames (None: as in training). The same seed, the same streams."""
    random = torch.Generator().manual_seed(seed)
    total = args.num_frames if num_frames is None else num_frames
    codes = _filler(args, batch, total, random, silent=kind == "silence")
    quarter = args.num_frames // 4
    start = {"trained": 0, "late": total - args.num_frames}.get(kind, 0)
    # The last three quarters, less what attention reaches.
    asked = (total - args.num_frames + quarter + args.min_distance_frames, total)
    if args.variant == "segments":
        return _segment(args, codes, (start, start + quarter), asked, random)
    keys = args.first_key + _distinct(batch, args.num_pairs, args.num_keys, random)
    fact_frames = 1 if args.variant == "joint" else 2
    regions = [(start, start + quarter)]
    if kind == "rebound":
        middle = (total - args.num_frames) // 2
        regions.append((middle, middle + quarter))
    for region in regions:
        facts = _places(batch, args.num_pairs, *region, random)
        values = torch.randint(args.num_values, keys.shape, generator=random) + args.first_value
        _put(codes, min(args.fact_streams), facts, keys)
        _put(codes, args.asked_stream, facts + fact_frames - 1, values)
    order = _distinct(batch, args.num_pairs, args.num_pairs, random)
    questions = _places(batch, args.num_pairs, *asked, random)
    _put(codes, min(args.fact_streams), questions, keys.gather(1, order))
    _put(codes, args.asked_stream, questions + 1, values.gather(1, order))
    return Streams(codes, questions + 1, facts.gather(1, order), fact_frames)


def _segment(
    args: StreamArgs,
    codes: Tensor,
    heard: tuple[int, int],
    again: tuple[int, int],
    random: torch.Generator,
) -> Streams:
    """Return one segment twice, with a text of tokens that all differ."""
    batch, length = len(codes), 2 * args.num_pairs
    words = args.first_key + _distinct(batch, length, args.num_keys, random)
    first, second = (
        torch.randint(start, stop - length + 1, (batch, 1), generator=random) + torch.arange(length)
        for start, stop in (heard, again)
    )
    _put(codes, 0, first, words)
    segment = codes.gather(2, first[:, None].expand(-1, codes.shape[1], -1))
    codes.scatter_(2, second[:, None].expand(-1, codes.shape[1], -1), segment)
    return Streams(codes, second[:, 1:], first[:, :-1])


def _filler(
    args: StreamArgs, batch: int, total: int, random: torch.Generator, *, silent: bool
) -> Tensor:
    shape = (batch, 1 + args.num_codebooks, total)
    codes = torch.randint(args.num_fillers, shape, generator=random) + FIRST_WORD
    is_word = torch.rand(batch, total, generator=random) < FILLER_WORD_SHARE
    speaks = _blocks(batch, total, SPEECH_BLOCK_FRAMES, SPEECH_SHARE, random)
    if silent:
        silence = _blocks(batch, total, BURST_BLOCK_FRAMES, BURST_SHARE, random)
        is_word &= ~silence
        speaks &= ~silence
    codes[:, 0].masked_fill_(~is_word, PADDING)
    codes[:, 1:].masked_fill_(~speaks[:, None], SILENCE)
    return codes


def _blocks(batch: int, total: int, size: int, share: float, random: torch.Generator) -> Tensor:
    """[B, T] booleans that change between blocks of frames alone."""
    chosen = torch.rand(batch, total // size + 1, generator=random) < share
    return chosen.repeat_interleave(size, dim=1)[:, :total]


def _distinct(batch: int, count: int, out_of: int, random: torch.Generator) -> Tensor:
    """[B, count] distinct numbers below `out_of`, in random order."""
    return torch.rand(batch, out_of, generator=random).argsort(1)[:, :count]


def _places(batch: int, count: int, start: int, stop: int, random: torch.Generator) -> Tensor:
    """[B, count] frames from `start` on, ascending, of pairs of frames that do not overlap."""
    free = _distinct(batch, count, stop - start - count, random).sort(1).values
    return start + free + torch.arange(count)


def _put(codes: Tensor, stream: int, frames: Tensor, tokens: Tensor) -> None:
    codes[:, stream].scatter_(1, frames, tokens)
