"""The rest of a recorded dialogue, as Moshi would have gone on."""

from pathlib import Path

from finetune.errors import UserError
from finetune.inference import continue_dialogue, load_for_inference, nonfinite_weights
from finetune.kept import write_wav, write_whole
from finetune.serve.options import GenerateOptions
from finetune.serve.targets import Job
from finetune.serve.words import Words


def continue_recording(options: GenerateOptions, job: Job) -> tuple[str, Path]:
    """See `finetune.cli.generate`; returns what Moshi says, and the wav that was written.

    Raises:
        UserError: a wrong path, option or checkpoint; see `continue_dialogue`.
    """
    model, codec = load_for_inference(options.checkpoint, options.device, options.base_precision)
    problem = nonfinite_weights(model)
    if problem is not None:
        raise UserError(f"--checkpoint: {options.checkpoint}: {problem}: there is nothing to hear.")
    continuation = continue_dialogue(
        model,
        codec,
        codec.read_recording(job.source),
        prompt_sec=options.prompt_sec,
        seed=options.seed,
        temperature=options.temperature,
        text_temperature=options.text_temperature,
    )
    words = Words(codec)
    for token in continuation.codes[0].tolist():
        words.add(token)
    write_whole(job.transcript, words.transcript())
    write_wav(job.target, continuation.audio.T.numpy(), codec.sample_rate_hz)
    return continuation.text, job.target
