"""The rest of a recorded dialogue, as Moshi would have gone on."""

import logging
from pathlib import Path

from finetune.data import Codec
from finetune.errors import UserError
from finetune.inference import (
    Continuation,
    continue_dialogue,
    load_for_inference,
    nonfinite_weights,
)
from finetune.kept import write_wav, write_whole
from finetune.serve.options import GenerateOptions
from finetune.serve.targets import NOTHING_KEPT, Job
from finetune.serve.words import Words

logger = logging.getLogger(__name__)


def continue_recording(options: GenerateOptions, job: Job) -> tuple[str, Path]:
    """See `finetune.cli.generate`; returns what Moshi says, and the wav that was written.

    Raises:
        UserError: a wrong path, option or checkpoint; see `continue_dialogue`.
    """
    model, codec = load_for_inference(options.checkpoint, options.device, options.base_precision)
    problem = nonfinite_weights(model)
    if problem is not None:
        raise UserError(f"--checkpoint: {options.checkpoint}: {problem}: there is nothing to hear.")

    def keep_part(begun: Continuation | None) -> None:
        kept = _keep_part(job, codec, begun) if begun is not None else NOTHING_KEPT
        logger.info("interrupted; %s", kept)

    continuation = continue_dialogue(
        model,
        codec,
        codec.read_recording(job.source),
        prompt_sec=options.prompt_sec,
        seed=options.seed,
        temperature=options.temperature,
        text_temperature=options.text_temperature,
        on_stop=keep_part,
    )
    _keep(job, codec, continuation)
    return continuation.text, job.target


def _keep_part(job: Job, codec: Codec, begun: Continuation) -> str:
    """Keep what there is when somebody stops it; return what is to be said of it."""
    part = job.part()
    try:
        _keep(part, codec, begun)
    except UserError as error:
        return f"the answer is not kept: {error}"
    return part.kept_for(begun.audio.shape[1] / codec.sample_rate_hz)


def _keep(job: Job, codec: Codec, continuation: Continuation) -> None:
    words = Words(codec)
    for token in continuation.codes[0].tolist():
        words.add(token)
    write_whole(job.transcript, words.transcript())
    write_wav(job.target, continuation.audio.T.numpy(), codec.sample_rate_hz)
