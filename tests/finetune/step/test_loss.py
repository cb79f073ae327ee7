"""The loss against its definition, written once more, target by target."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_codes, tiny_model

from finetune.step import LossWeights, stream_sums, target_weights, total_weight
from ttt import TTTLMModel

WEIGHTS = LossWeights(text_padding=0.3, first_codebook=7.0)


def codes_with_gaps() -> torch.Tensor:
    """Three rows of 23 frames: complete, ending after 9 frames, and empty; with text padding."""
    codes = random_codes(batch=3)
    codes[:, 0, ::2] = 3
    codes[:, 0, 3::8] = 0
    codes[1, :, 9:] = -1
    codes[2] = -1
    return codes


def by_definition(
    model: TTTLMModel, codes: torch.Tensor, weights: LossWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """For text and audio: Σ w · CE, Σ w, Σ CE and the number of targets, one target at a time."""
    output = model(codes)
    text, audio = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for row, stream, frame in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        target = codes[row, stream, frame]
        if stream == 0 and output.text_mask[row, 0, frame]:
            nll = F.cross_entropy(output.text_logits[row, 0, frame], target)
            weight = weights.text_padding if target in (0, 3) else 1.0
            text += torch.stack([weight * nll, torch.tensor(weight), nll, torch.tensor(1)])
        if 1 <= stream <= 4 and output.mask[row, stream - 1, frame]:
            nll = F.cross_entropy(output.logits[row, stream - 1, frame], target)
            weight = weights.first_codebook if stream == 1 else 1.0
            audio += torch.stack([weight * nll, torch.tensor(weight), nll, torch.tensor(1)])
    return text, audio


@torch.no_grad()
def test_the_sums_are_those_of_the_definition() -> None:
    model, codes = tiny_model(), codes_with_gaps()
    sums = stream_sums(model, model(codes), codes, WEIGHTS)
    for kind, expected in zip(sums, by_definition(model, codes, WEIGHTS), strict=True):
        found = torch.stack([kind.loss, kind.weight.double(), kind.nll, kind.count.double()])
        # The loss is taken in float32, whatever the model's type.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("delays", [[0, 0, 1, 1, 1, 0, 1, 1, 1], [2, 0, 3, 1, 0, 1, 0, 2, 4]])
@torch.no_grad()
def test_weights_known_before_the_forward_pass_are_zero_where_the_model_masks(
    delays: list[int],
) -> None:
    model, codes = tiny_model(delays=delays), codes_with_gaps()
    output = model(codes)
    text, audio = target_weights(model, codes, WEIGHTS)
    assert torch.equal(text > 0, output.text_mask)
    assert torch.equal(audio > 0, output.mask)
    sums = stream_sums(model, output, codes, WEIGHTS)
    expected = torch.stack([kind.weight for kind in sums])
    torch.testing.assert_close(total_weight(model, [codes], WEIGHTS), expected)


def test_gradients_are_finite_where_logits_are_not() -> None:
    model, codes = tiny_model(), codes_with_gaps()
    output = model(codes)
    assert output.logits.isnan().any()
    text, audio = stream_sums(model, output, codes, WEIGHTS)
    (text.loss + audio.loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.linears[1].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_batch_without_any_target_weighs_nothing() -> None:
    model, codes = tiny_model(), torch.full((1, 9, 23), -1)
    for kind in stream_sums(model, model(codes), codes, WEIGHTS):
        assert [kind.loss.item(), kind.weight.item(), kind.nll.item(), kind.count.item()] == [0] * 4
