"""Windowed scoring against one long forward pass, and codes read part by part."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_tools import tiny_codec, write_jsonl, write_recording
from helpers import random_codes, tiny_args, tiny_delta_args, tiny_linear_args, tiny_model

import ttt
from finetune.data import check_recordings
from finetune.evaluation.codes import Silence, encode_to_file
from finetune.evaluation.streaming import Scorer, cut
from finetune.step import LossWeights, stream_sums
from ttt import TTTArgs, TTTLMModel, block_streaming

WEIGHTS = LossWeights(text_padding=0.5, first_codebook=3.0)


class InMemory:
    """Codes [num_streams, T] as the scorer reads them."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes
        self.num_frames = codes.shape[1]

    def read(self, start_frame: int, stop_frame: int) -> torch.Tensor:
        return self.codes[:, start_frame:stop_frame]


def scored(
    model: TTTLMModel, rows: list[Any], *, block_frames: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CE, weights and targets of whole recordings, [B, 1 + dep_q, T] each, by position."""
    rows = [InMemory(row) for row in rows]
    num_frames = max(row.num_frames for row in rows)
    shape = (len(rows), 1 + model.dep_q, num_frames)
    nll, weight = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    is_target = torch.zeros(shape, dtype=torch.bool)
    with block_streaming(model, len(rows), block_frames):
        scorer = Scorer(model, rows, weights=WEIGHTS, block_frames=block_frames)
        for block in scorer.score(**options):
            for stream, frames in enumerate(block.frames):
                here = frames >= 0
                nll[:, stream, frames[here]] = block.nll[:, stream, here].double()
                weight[:, stream, frames[here]] = block.weight[:, stream, here].double()
                is_target[:, stream, frames[here]] = block.is_target[:, stream, here]
    return nll * is_target, weight, is_target


def whole(model: TTTLMModel, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CE of one recording [num_streams, T] by one forward pass, and where there is a target."""
    output = model(codes[None])
    offset = model.audio_offset
    parts: list[Any] = []
    for logits, targets, mask in (
        (output.text_logits, codes[None, :offset], output.text_mask),
        (output.logits, codes[None, offset : offset + model.dep_q], output.mask),
    ):
        logits = torch.where(mask[..., None], logits, 0.0).float()
        nll = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
        parts.append(nll.view_as(mask).double() * mask)
    return torch.cat(parts, 1)[0], torch.cat([output.text_mask, output.mask], 1)[0]


@pytest.mark.parametrize(
    "args", [tiny_args(), tiny_delta_args(), tiny_linear_args()], ids=["sum", "delta", "linear"]
)
@pytest.mark.parametrize("block_frames", [1, 7, 64])
@torch.no_grad()
def test_windowed_scoring_equals_one_long_forward_pass(args: TTTArgs, block_frames: int) -> None:
    """Although the sequence is five times as long as attention sees, and blocks cut everywhere."""
    model, codes = tiny_model(args), random_codes(batch=1, num_frames=60)
    nll, weight, is_target = scored(model, list(codes), block_frames=block_frames)
    expected, expected_targets = whole(model, codes[0])
    assert torch.equal(is_target[0], expected_targets)
    assert torch.allclose(nll[0], expected, atol=1e-5)
    # The sums of the training loss, with its weights.
    for sums, streams in zip(
        stream_sums(model, model(codes), codes, WEIGHTS), (slice(0, 1), slice(1, None)), strict=True
    ):
        assert float(weight[:, streams].sum()) == pytest.approx(float(sums.weight))
        weighted = (nll * weight)[:, streams].sum()
        assert float(weighted) == pytest.approx(float(sums.loss), rel=1e-6)


@torch.no_grad()
def test_every_row_is_scored_as_it_is_alone() -> None:
    model = tiny_model()
    rows = [random_codes(batch=1, num_frames=n, seed=n)[0] for n in (60, 13, 41)]
    together = scored(model, rows, block_frames=16)
    for index, row in enumerate(rows):
        alone = scored(model, [row], block_frames=16)
        for batched, single in zip(together, alone, strict=True):
            assert torch.allclose(batched[index, :, : row.shape[1]], single[0], atol=1e-6)
            assert not batched[index, :, row.shape[1] :].any()


@torch.no_grad()
def test_without_ttt_the_model_is_the_plain_one() -> None:
    for args in (tiny_args(), tiny_linear_args()):
        model, codes = tiny_model(args), random_codes(batch=1, num_frames=40)[0]
        plain = tiny_model(TTTArgs(enabled=False))
        plain.load_state_dict(model.state_dict(), strict=False)
        with ttt.without_ttt(model):
            without, _, _ = scored(model, [codes], block_frames=8)
        assert torch.equal(without, scored(plain, [codes], block_frames=8)[0])
        assert not torch.allclose(without, scored(model, [codes], block_frames=8)[0])


@torch.no_grad()
def test_a_reset_forgets_what_ttt_has_learned_and_not_what_attention_sees() -> None:
    model, codes = tiny_model(), random_codes(batch=1, num_frames=40)[0]
    on, _, _ = scored(model, [codes], block_frames=8)
    never = scored(model, [codes], block_frames=8, reset_every_frames=40)[0]
    # A chunk of 5 frames is written after it: reset at each, nothing is ever read.
    always = scored(model, [codes], block_frames=8, reset_every_frames=5)[0]
    once = scored(model, [codes], block_frames=8, reset_every_frames=20)[0]
    with ttt.without_ttt(model):
        off, _, _ = scored(model, [codes], block_frames=8)
    assert torch.equal(never, on) and torch.allclose(always, off, atol=1e-6)
    # The text of a frame is predicted in its own step; the audio delayed by one, a step later.
    assert torch.equal(once[0, :, :19], on[0, :, :19])
    assert not torch.allclose(once[0, :, 20:], on[0, :, 20:])
    assert not torch.allclose(once[0, :, 20:], off[0, :, 20:])


@torch.no_grad()
def test_rows_learn_from_recordings_of_different_lengths_as_alone() -> None:
    model = tiny_model()
    rows = [InMemory(random_codes(batch=1, num_frames=n, seed=n)[0]) for n in (30, 10)]

    def state_after(*rows: Any) -> dict[str, Any]:
        with block_streaming(model, len(rows), 8):
            scorer = Scorer(model, rows, weights=WEIGHTS, block_frames=8)
            scorer.learn([row.num_frames for row in rows])
            return {n: x for n, x in ttt.get_state(model).items() if n.endswith("change")}

    together = state_after(*rows)
    for index, row in enumerate(rows):
        for name, change in state_after(row).items():
            assert torch.allclose(together[name][index], change[0]) and change.any()


@pytest.mark.parametrize(
    "args", [tiny_args(), tiny_delta_args(), tiny_linear_args()], ids=["sum", "delta", "linear"]
)
@torch.no_grad()
def test_rows_go_on_from_donors_of_different_lengths_as_alone(args: TTTArgs) -> None:
    model = tiny_model(args)
    rows = [InMemory(random_codes(batch=1, num_frames=60, seed=n)[0]) for n in (1, 2)]
    donors = [InMemory(random_codes(batch=1, num_frames=n, seed=n)[0]) for n in (60, 20)]

    def scored_after(rows: Any, donors: Any) -> torch.Tensor:
        with block_streaming(model, len(rows), 8):
            scorer = Scorer(model, donors, weights=WEIGHTS, block_frames=8)
            scorer.learn([donor.num_frames for donor in donors])
            state = ttt.get_state(model)
            model.reset_streaming()
            ttt.set_state(model, state)
            scorer = Scorer(model, rows, weights=WEIGHTS, block_frames=8)
            return torch.cat([block.nll for block in scorer.score()], dim=2)

    together = scored_after(rows, donors)
    for index in range(2):
        alone = scored_after(rows[index : index + 1], donors[index : index + 1])
        assert torch.allclose(together[index], alone[0], atol=1e-5)


def test_ranges_end_at_blocks_and_at_cuts() -> None:
    assert cut(20, 8) == [(0, 8), (8, 16), (16, 20)]
    assert cut(20, 8, [0, 5, 10, 20, 30]) == [(0, 5), (5, 8), (8, 10), (10, 16), (16, 20)]
    assert cut(1, 8) == [(0, 1)]


@pytest.mark.parametrize("rate_hz", [24_000, 16_000])
def test_codes_read_part_by_part_are_those_of_the_whole_recording(
    tmp_path: Path, rate_hz: int
) -> None:
    """Far beyond what Mimi's attention sees, 2 s here, and beyond a block of 10 s."""
    line = write_recording(tmp_path, "a.wav", 27.3, rate_hz=rate_hz)
    path, codec = tmp_path / "a.wav", tiny_codec()
    whole = codec.encode([codec.read_recording(path)])[0]
    recordings, _ = check_recordings(str(write_jsonl(tmp_path / "a.jsonl", [line])), key="data")
    codes = encode_to_file(codec, recordings[0], tmp_path / "codes")
    assert codes.num_frames == whole.shape[1]
    parts = codes.read(0, codes.num_frames)
    assert torch.equal(parts[0], whole[0])
    # A rounding error may tip a code now and then, which changes the finer ones of its frame.
    assert (parts == whole).float().mean() > 0.999
    assert torch.equal(codes.read(130, 140), parts[:, 130:140])
    first = encode_to_file(codec, recordings[0], tmp_path / "first", max_frames=50)
    assert torch.equal(first.read(0, 50), parts[:, :50])


def test_silence_is_encoded_not_assumed() -> None:
    codec = tiny_codec()
    silence = Silence(codec)
    long, short = silence.codes(300), silence.codes(20)
    expected = codec.mimi.encode(torch.zeros(1, 1, 300 * 1920))[0]
    assert (long == expected).float().mean() > 0.999 and torch.equal(short, long[:, :20])
