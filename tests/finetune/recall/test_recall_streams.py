"""The streams of the recall experiment: what is asked has an answer, and it is far away."""

import dataclasses
from typing import Any, Literal

import pytest
import torch

from finetune.recall.streams import (
    BURST_BLOCK_FRAMES,
    KINDS,
    PADDING,
    SILENCE,
    Kind,
    StreamArgs,
    draw,
)

ARGS = StreamArgs(num_frames=256, num_pairs=6, reach_frames=30)
Variant = Literal["text", "audio", "joint", "segments"]
VARIANTS: list[Variant] = ["text", "audio", "segments"]


def with_variant(variant: Variant) -> StreamArgs:
    return dataclasses.replace(ARGS, variant=variant)


def known_to_a_perfect_memory(
    args: StreamArgs, codes: torch.Tensor, row: int, frame: int
) -> int | None:
    """The answer at `frame` of a reader who remembers what followed each key, and all else not."""
    asked = codes[row, args.asked_stream].tolist()
    key, answer = asked[frame - 1], None
    for t in range(frame - 1):
        if asked[t] == key:
            answer = asked[t + 1]
    return answer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["trained", *KINDS])
def test_every_answer_follows_from_the_newest_fact(variant: Variant, kind: Kind) -> None:
    if variant == "segments" and kind == "rebound":
        return
    args = with_variant(variant)
    streams = draw(args, batch=3, seed=1, kind=kind, num_frames=1024 if kind != "trained" else None)
    asked = streams.codes[:, args.asked_stream]
    for row in range(3):
        for fact, answer in zip(
            streams.facts[row].tolist(), streams.answers[row].tolist(), strict=True
        ):
            said = asked[row, answer].item()
            assert known_to_a_perfect_memory(args, streams.codes, row, answer) == said
            assert asked[row, fact] == asked[row, answer - 1]
            assert asked[row, fact + 1] == said


@pytest.mark.parametrize("variant", VARIANTS)
def test_questions_come_from_beyond_the_reach_of_attention(variant: Variant) -> None:
    args = with_variant(variant)
    streams = draw(args, batch=50, seed=2)
    # The value is read one frame after its key, so that much nearer.
    assert (streams.distances - 1).min() > args.reach_frames
    assert streams.distances.max() < args.num_frames
    assert streams.facts.max() < args.num_frames // 4
    distances = streams.distances.float()
    assert distances.max() > 5 * args.reach_frames and distances.std() > 30


def test_a_joint_fact_is_one_frame_of_two_streams() -> None:
    args = with_variant("joint")
    streams = draw(args, batch=20, seed=1)
    text, codebook = streams.codes[:, 0], streams.codes[:, 1]
    assert torch.equal(text.gather(1, streams.facts), text.gather(1, streams.answers - 1))
    assert torch.equal(codebook.gather(1, streams.facts), codebook.gather(1, streams.answers))
    assert (codebook.gather(1, streams.facts) >= args.first_value).all()
    assert not streams.straddling(4).any()


def test_nothing_but_the_fact_tells_the_answer() -> None:
    """Values are paired with keys anew: over many streams, no answer is likelier than another for
    a key, and no other stream nor neighbor goes with it."""
    streams = draw(ARGS, batch=4000, seed=3)
    answers = streams.codes[:, 0].gather(1, streams.answers)
    counts = torch.bincount(answers.flatten() - ARGS.first_value, minlength=ARGS.num_values)
    assert counts.min() > 0.8 * counts.float().mean()
    keys = streams.codes[:, 0].gather(1, streams.answers - 1)
    for other in (keys, streams.codes[:, 1].gather(1, streams.answers - 1), streams.answers):
        x, y = (v.flatten().double() - v.double().mean() for v in (other, answers))
        assert abs((x * y).mean() / (x.std() * y.std())) < 0.03
    # Each key is asked for once, and a sequence has it in its fact and question alone.
    for row in range(20):
        said = streams.codes[row, 0]
        assert len(set(keys[row].tolist())) == ARGS.num_pairs
        is_key = (said >= ARGS.first_key) & (said < ARGS.first_value)
        assert is_key.sum() == 2 * ARGS.num_pairs
    assert (streams.codes[:, 1:] < ARGS.first_key).all()


def test_straddling_pairs_are_those_an_update_divides() -> None:
    """A code is read one position after its frame: with updates every 4 positions, the key of a
    divided pair is read at position 3, 7, …"""
    streams = draw(ARGS, batch=100, seed=4)
    straddling = streams.straddling(4)
    assert torch.equal(straddling, (streams.facts + 1) % 4 == 3)
    assert 0.2 < straddling.float().mean() < 0.3
    assert not streams.straddling(1024).any()


def test_long_streams_have_facts_where_their_kind_says() -> None:
    total = 2048
    kinds = {kind: draw(ARGS, batch=4, seed=5, kind=kind, num_frames=total) for kind in KINDS}
    assert kinds["old"].facts.max() < 64 and kinds["silence"].facts.max() < 64
    assert kinds["late"].facts.min() >= total - 256
    for streams in kinds.values():
        assert streams.answers.min() > total - 256 and streams.codes.shape == (4, 9, total)
    # Keys are bound twice, and the second value, which counts, is in the middle.
    rebound = kinds["rebound"]
    assert rebound.facts.min() > 800 and rebound.facts.max() < 1000
    keys = rebound.codes[:, 0].gather(1, rebound.facts)
    first = (rebound.codes[:, 0, None, :64] == keys[:, :, None]).sum(2)
    assert (first == 1).all()


def test_bursts_of_silence_are_silent_in_every_stream() -> None:
    silence = draw(ARGS, batch=8, seed=6, kind="silence", num_frames=4096).codes
    plain = draw(ARGS, batch=8, seed=6, kind="old", num_frames=4096).codes

    def silent_blocks(codes: torch.Tensor) -> float:
        is_silent = (codes[:, 0] == PADDING) & (codes[:, 1:] == SILENCE).all(1)
        return is_silent.unflatten(1, (-1, BURST_BLOCK_FRAMES)).all(2).float().mean()

    assert silent_blocks(plain) == 0
    assert 0.45 < silent_blocks(silence) < 0.7


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_is_a_stream(variant: Variant) -> None:
    args = with_variant(variant)
    first, again, other = (draw(args, batch=2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.answers, again.answers)
    assert not torch.equal(first.codes, other.codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pairs": 40}, "40 facts and as many questions"),
        ({"reach_frames": 200}, "do not fit into 256 frames with 202"),
        ({"num_keys": 5}, "5 keys are too few for 6 facts"),
        ({"num_keys": 11, "variant": "segments"}, "11 keys are too few"),
    ],
)
def test_streams_that_cannot_be_are_explained(changes: dict[str, Any], message: str) -> None:
    assert message in "; ".join(dataclasses.replace(ARGS, **changes).problems())
    assert not ARGS.problems()
