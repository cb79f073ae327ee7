"""Loss and perplexity of a model on all of the evaluation data."""

import math
from collections.abc import Callable, Iterable

import torch

from finetune.data import Batch
from finetune.distributed import World
from finetune.loss import LossWeights, stream_sums
from finetune.sharding import let_go
from ttt import TTTLMModel


@torch.no_grad()
def evaluate(
    model: TTTLMModel,
    batches: Iterable[Batch],
    weights: LossWeights,
    world: World,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Average over all targets of all batches of all processes; every target counts once.

    Args:
        should_stop: asked before every batch; true ends early, and the result means nothing.

    Returns:
        loss, text_loss, audio_loss: as in training, with its weights, in nats.
        text_nll, audio_nll: without weights, in nats per token.
        text_perplexity, audio_perplexity: exp of these.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, 4, dtype=torch.float64)
    # All zero tokens, which weigh nothing, where another process has more batches than this one.
    codes = torch.full((1, model.num_codebooks, 16), model.zero_token_id, device=world.device)
    for batch in world.in_step(batches, should_stop):
        codes = torch.full_like(codes, model.zero_token_id) if batch is None else batch.codes
        for row, sums in enumerate(stream_sums(model, model(codes), codes, weights)):
            parts = (sums.loss, sums.weight, sums.nll, sums.count)
            total[row] += torch.stack([part.double() for part in parts]).cpu()
    model.train(was_training)
    let_go(model)
    totals = world.sum(total.to(world.device)).tolist()
    (text_loss, text_nll), (audio_loss, audio_nll) = (
        (loss / max(weight, 1e-9), nll / max(count, 1)) for loss, weight, nll, count in totals
    )
    return {
        "loss": text_loss + audio_loss,
        "text_loss": text_loss,
        "audio_loss": audio_loss,
        "text_nll": text_nll,
        "audio_nll": audio_nll,
        "text_perplexity": math.exp(min(text_nll, 700.0)),
        "audio_perplexity": math.exp(min(audio_nll, 700.0)),
    }
