"""A tiny codec and small data sets for the tests of `finetune.data`."""

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import get_mimi
from moshi.utils.compile import no_compile

from finetune.data import Codec

WORDS = ["hello", "there", "how", "are", "you", "fine", "thanks", "goodbye"]


@functools.cache
def tiny_tokenizer() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS), *WORDS] * 4),
        model_writer=model,
        vocab_size=40,
        pad_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


MIMI_CONFIG: dict[str, Any] = dict(
    sample_rate=24000,
    channels=1,
    frame_rate=12.5,
    seanet=dict(
        channels=1, dimension=16, causal=True, n_filters=4, n_residual_layers=1,
        activation="ELU", compress=2, dilation_base=2, disable_norm_outer_blocks=0,
        kernel_size=7, residual_kernel_size=3, last_kernel_size=3, norm="none",
        pad_mode="constant", ratios=[8, 6, 5, 4], true_skip=True,
    ),
    transformer=dict(
        d_model=16, num_heads=2, num_layers=1, causal=True, layer_scale=0.01, context=50,
        conv_layout=True, max_period=10000, gating="none", norm="layer_norm",
        positional_embedding="rope", dim_feedforward=32, input_dimension=16,
        output_dimensions=[16],
    ),
    quantizer=dict(dimension=8, n_q=8, bins=32, input_dimension=16, output_dimension=16),
)  # fmt: skip


@functools.cache
def tiny_mimi() -> MimiModel:
    """A random Mimi whose codebooks are drawn from its own latents, so that codes vary."""
    with torch.random.fork_rng(), torch.no_grad(), no_compile():
        torch.manual_seed(0)
        mimi = get_mimi(None, MIMI_CONFIG, num_codebooks=8)
        noise = torch.randn(1, 1, 10 * 24000) * torch.rand(125).repeat_interleave(1920)
        latents = mimi._encode_to_unquantized_latent(noise)
        for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            residual = part.input_proj(latents)[0].T
            for layer in part.vq.layers:
                layer._codebook.embedding_sum.copy_(residual[torch.randperm(125)[:32]])
                codes = layer._codebook.encode(residual)
                residual = residual - layer._codebook.decode(codes)
    return mimi


def tiny_codec() -> Codec:
    return Codec(tiny_mimi(), tiny_tokenizer(), moshi_codebooks=8, user_codebooks=8)


def speech_like(
    duration_sec: float, rate_hz: int, *, seed: int = 0, channels: int = 2
) -> np.ndarray:
    """Noise whose loudness changes, below full scale: `[num_samples, channels]`."""
    return _speech_like(round(duration_sec * rate_hz), seed, channels).copy()


@functools.lru_cache(maxsize=32)
def _speech_like(num_samples: int, seed: int, channels: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    loudness = np.interp(np.arange(num_samples), np.arange(0, num_samples + 1000, 1000),
                         generator.random(len(range(0, num_samples + 1000, 1000))))  # fmt: skip
    noise = generator.standard_normal((num_samples, channels))
    return (0.1 * noise * loudness[:, None]).clip(-1, 1).astype(np.float32)


def some_words(duration_sec: float) -> list[list]:
    """Two words every second."""
    starts = np.arange(0.1, duration_sec - 0.3, 0.5).round(2).tolist()
    return [
        [WORDS[index % len(WORDS)], [start, round(start + 0.25, 2)], "SPEAKER_MAIN"]
        for index, start in enumerate(starts)
    ]


def write_recording(
    folder: Path, name: str, duration_sec: float, *, rate_hz: int = 24000, seed: int = 0
) -> dict:
    """A stereo recording with its transcript; returns its line."""
    samples = speech_like(duration_sec, rate_hz, seed=seed)
    soundfile.write(folder / name, samples, rate_hz)
    transcript = {"alignments": some_words(duration_sec)}
    (folder / name).with_suffix(".json").write_text(json.dumps(transcript))
    return {"path": name, "duration": duration_sec}


def write_jsonl(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def write_dataset(folder: Path, durations_sec: Sequence[float], *, seed: int = 0) -> Path:
    """Recordings of the given lengths; returns their `.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        write_recording(folder, f"{index}.wav", duration_sec, seed=seed + index)
        for index, duration_sec in enumerate(durations_sec)
    ]
    return write_jsonl(folder / "all.jsonl", lines)
