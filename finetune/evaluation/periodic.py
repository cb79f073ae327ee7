"""A training run measures now and then: loss and perplexity on all of the evaluation data,
and whether the model still speaks."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finetune.config import TrainArgs
from finetune.data import Batch, Codec, count_frames
from finetune.distributed import World, let_go, shard_size
from finetune.evaluation.tasks.health.measure import alarms, check_health, means
from finetune.step import LossWeights, stream_sums
from ttt import TTTLMModel

logger = logging.getLogger(__name__)

NUM_CONTINUATIONS = 2
PROMPT_SEC = 2.0
MIN_HEALTH_SEC = 1.0


@torch.no_grad()
def evaluate(
    model: TTTLMModel,
    batches: Iterable[Batch],
    weights: LossWeights,
    world: World,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Average over all targets of all batches of all data ranks; every target counts once.

    Args:
        should_stop: asked before every batch; true ends early, and the result means nothing.

    Returns:
        loss, text_loss, audio_loss: as in training, with its weights, in nats.
        text_nll, audio_nll: without weights, in nats per token.
        text_perplexity, audio_perplexity: exp of these.
    """
    total = torch.zeros(2, 4, dtype=torch.float64)
    # All zero tokens, which weigh nothing, where another process has more batches than this one.
    codes = torch.full((1, model.num_codebooks, 16), model.zero_token_id, device=world.device)
    with _evaluating(model):
        for batch in world.in_step(batches, should_stop):
            codes = torch.full_like(codes, model.zero_token_id) if batch is None else batch.codes
            output = model(codes, with_heads=False)
            for row, sums in enumerate(stream_sums(model, output, codes, weights)):
                parts = (sums.loss, sums.weight, sums.nll, sums.count)
                total[row] += torch.stack([part.double() for part in parts]).cpu()
    totals = world.sum_over_data(total.to(world.device)).tolist()
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


@contextmanager
def _evaluating(model: TTTLMModel) -> Iterator[None]:
    """Have a model evaluate; after this it is as it was, also where an error has ended it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        let_go(model)


def build_speech_check(args: TrainArgs, codec: Codec, world: World) -> "SpeechCheck | None":
    """The first process's, if the configuration asks for it and the run can do it; the log says why
    it cannot."""
    if not args.do_eval or args.health_sec == 0 or not world.is_main:
        return None
    if why := _why_unchecked(args, world.size):
        logger.warning(
            "health_sec: the health of speech is not checked in this run: %s. `moshi-ttt evaluate "
            "--tasks health` checks it for a checkpoint; health_sec: 0 leaves it out",
            why,
        )
        return None
    return SpeechCheck(codec, health_sec=args.health_sec, seed=args.seed)


def _why_unchecked(args: TrainArgs, num_processes: int) -> str | None:
    if shard_size(args, num_processes) > 1:
        return (
            "a sharded model (parallel.shard_size) would have to be gathered from all processes "
            "for every frame that it speaks"
        )
    least_frames = count_frames(MIN_HEALTH_SEC)
    if count_frames(args.health_sec) < least_frames:
        return f"it takes at least {MIN_HEALTH_SEC:g} s, and these are {args.health_sec:g} s"
    if count_frames(args.duration_sec) < count_frames(PROMPT_SEC) + least_frames:
        return (
            f"it takes segments (duration_sec) of {PROMPT_SEC + MIN_HEALTH_SEC:g} s, and these are "
            f"of {args.duration_sec:g} s"
        )
    return None


class SpeechCheck:
    """Continuations of the first complete segments of the evaluation data, the same every time.

    Args:
        health_sec: length of the continuations, as far as segments allow.
    """

    def __init__(self, codec: Codec, *, health_sec: float, seed: int) -> None:
        self.codec = codec
        self.seed = seed
        self.prompt_frames = count_frames(PROMPT_SEC)
        self.num_frames = self.prompt_frames + count_frames(health_sec)
        self._codes: Tensor | None = None

    def __call__(
        self,
        model: TTTLMModel,
        batches: Iterable[Batch],
        *,
        step: int,
        after_frame: Callable[[], object] = lambda: None,
    ) -> dict[str, float]:
        """Warn if what the model says is no longer like speech.

        Args:
            after_frame: is called after every frame, as there may be many.

        Returns:
            The measures by name, `health/entropy` and so on; nothing if no segment is complete or
            the device has no memory for it.
        """
        if self._codes is None:
            self._codes = self._first_segments(batches)
        if not len(self._codes):
            return {}
        try:
            with _evaluating(model):
                results = check_health(
                    model,
                    self.codec,
                    self._codes,
                    prompt_frames=self.prompt_frames,
                    seed=self.seed,
                    after_frame=after_frame,
                )
        except torch.OutOfMemoryError:
            logger.warning("no memory to check the health of speech; health_sec: 0 turns it off")
            return {}
        own, usual = means(results, "generated"), means(results, "recorded")
        # Before the first step there may be random weights, which say nothing of the run.
        for alarm in alarms(own, usual) if step else []:
            logger.warning(
                "generated speech at step %d: %s (%s %.2f); see docs/evaluation.md",
                step,
                alarm.text,
                alarm.measure,
                own[alarm.measure],
            )
        return {f"health/{name}": value for name, value in own.items()}

    def _first_segments(self, batches: Iterable[Batch]) -> Tensor:
        """[B, 17, T] of `num_frames`, or as long as segments are."""
        found: list[Tensor] = []
        for batch in batches:
            codes = batch.codes[:, :, : self.num_frames]
            found += [row for row in codes if bool((row[0] >= 0).all())]
            if len(found) >= NUM_CONTINUATIONS:
                break
        if not found:
            logger.warning(
                "no segment of data.eval_data is as long as duration_sec: the health of speech is "
                "not checked"
            )
            return torch.zeros(0, 1, 0)
        return torch.stack(found[:NUM_CONTINUATIONS])
