"""Trains the small Mimi of the demonstration on synthetic dialogues.

    python research/train_mimi.py --data DIR --out example/demo/model/mimi.safetensors

The network is the stock one (`moshi.models.loaders.get_mimi`), described by `mimi_config.json`
beside the output. A quarter of the time it learns to copy speech through its narrow middle; then
k-means starts the codebooks and it learns on with quantized latents. The loss compares mel
spectrograms at several resolutions. The weights are written in float16, and what is measured at
the end is the model read back from that file.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchaudio
from moshi.models.compression import MimiModel
from moshi.models.loaders import get_mimi
from moshi.quantization.core_vq import EuclideanCodebook
from moshi.utils.compile import no_compile
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.spoken import SAMPLE_RATE_HZ

logger = logging.getLogger(__name__)

NUM_CODEBOOKS = 8
_FFT_SIZES_AND_MELS = ((256, 20), (512, 40), (1024, 100), (2048, 200))
_LOG_FLOOR = 1e-3  # of a full-scale magnitude: what is quieter counts as silence
_SEGMENT_FRAMES = 36
_UNQUANTIZED_SHARE = 0.25  # of the time
_WARM_UP_SHARE = 0.02
_COMMITMENT_WEIGHT = 0.25
_SPOKEN_SHARE = 0.85  # of the segments; the rest may be silent
_MIN_SPOKEN_RMS = 0.02
_MAX_GRAD_NORM = 1.0


class MelLoss(nn.Module):
    """Multi-resolution mel distance: the mean of |Δ log| + |Δ| over bands, frames, FFT sizes."""

    def __init__(self) -> None:
        super().__init__()
        for size, num_mels in _FFT_SIZES_AND_MELS:
            banks = torchaudio.functional.melscale_fbanks(
                size // 2 + 1, 0.0, SAMPLE_RATE_HZ / 2, num_mels, SAMPLE_RATE_HZ, None, "slaney"
            )
            self.register_buffer(f"banks_{size}", banks, persistent=False)
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)

    def mel(self, wav: Tensor, size: int) -> Tensor:
        """wav: [B, S] within ±1. Returns magnitudes [B, mels, frames]."""
        window = getattr(self, f"window_{size}")
        spectrum = torch.stft(wav, size, size // 4, window=window, return_complex=True)
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-12)
        return getattr(self, f"banks_{size}").T @ magnitude / window.sum().sqrt()

    def forward(self, wav: Tensor, target: Tensor) -> Tensor:
        """wav, target: [B, 1, S]. Returns a scalar."""
        losses = []
        for size, _ in _FFT_SIZES_AND_MELS:
            a, b = self.mel(wav[:, 0], size), self.mel(target[:, 0], size)
            log_distance = ((a + _LOG_FLOOR).log() - (b + _LOG_FLOOR).log()).abs().mean()
            losses.append(log_distance + (a - b).abs().mean())
        return torch.stack(losses).mean()


class Segments:
    """Random segments of recordings held in memory, every channel a voice of its own."""

    def __init__(self, jsonl_paths: Sequence[Path], length_samples: int, device: str, seed: int):
        channels = [channel for path in jsonl_paths for wav in read_wavs(path) for channel in wav]
        self.samples = torch.cat(channels).to(device)
        self.length_samples = length_samples
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, batch_size: int) -> Tensor:
        """Returns [B, 1, S], most of it speech, at random loudness."""
        device = self.samples.device
        last = len(self.samples) - self.length_samples
        starts = torch.randint(last, (4 * batch_size,), generator=self.generator, device=device)
        offsets = torch.arange(self.length_samples, device=device)
        wav = self.samples[starts[:, None] + offsets].float() / 32768
        spoken = wav.square().mean(1).sqrt() > _MIN_SPOKEN_RMS
        chance = torch.rand(len(starts), generator=self.generator, device=device)
        wanted = torch.where(spoken, chance, chance * (1 - _SPOKEN_SHARE))
        wav = wav[wanted.argsort(descending=True)[:batch_size]]
        gain = torch.rand(len(wav), 1, 1, generator=self.generator, device=device)
        return wav[:, None] * (0.5 + 0.6 * gain)


def read_wavs(jsonl_path: Path) -> list[Tensor]:
    """The recordings that a dialogue list names: int16 [channels, S] each."""
    wavs = []
    for line in jsonl_path.read_text(encoding="utf-8").splitlines():
        with wave.open(str(jsonl_path.parent / json.loads(line)["path"]), "rb") as file:
            assert file.getframerate() == SAMPLE_RATE_HZ and file.getsampwidth() == 2
            pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            wavs.append(torch.from_numpy(pcm.reshape(-1, file.getnchannels()).T.copy()))
    return wavs


def train(
    mimi: MimiModel,
    segments: Segments,
    *,
    minutes: float,
    batch_size: int,
    peak_lr: float,
    unquantized_share: float,
) -> None:
    """Trains `mimi` in place for so many minutes; the learning rate falls to zero in a cosine.

    For `unquantized_share` of the time, the quantizer is left out.
    """
    loss_function = MelLoss().to(segments.samples.device)
    optimizer = torch.optim.AdamW(mimi.parameters(), lr=peak_lr, betas=(0.8, 0.99), fused=True)
    mimi.train()
    start = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        decay = 0.5 + 0.5 * math.cos(math.pi * progress)
        lr = peak_lr * min(1.0, progress / _WARM_UP_SHARE) * decay
        for group in optimizer.param_groups:
            group["lr"] = lr
        wav = segments.draw(batch_size)
        quantized = progress >= unquantized_share
        rebuilt, commitment = _forward(mimi, wav, quantized)
        distance = loss_function(rebuilt, wav)
        optimizer.zero_grad()
        (distance + _COMMITMENT_WEIGHT * commitment).backward()
        nn.utils.clip_grad_norm_(mimi.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        if step % 200 == 0:
            logger.info(
                "step %5d  %3.0f %%  quantized %d  loss %.3f  commitment %.3f",
                *(step, 100 * progress, quantized, distance.item(), commitment.item()),
            )
        step += 1
    mimi.eval()
    logger.info("%d steps in %.1f min", step, (time.monotonic() - start) / 60)


def _forward(mimi: MimiModel, wav: Tensor, quantized: bool) -> tuple[Tensor, Tensor]:
    """wav: [B, 1, S], S whole frames. Returns what Mimi makes of it and the commitment loss."""
    if quantized:
        result = mimi(wav)
        assert result.penalty is not None
        return result.x, result.penalty
    latent = mimi._to_framerate(mimi.encoder_transformer(mimi.encoder(wav))[0])
    halves = (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest)
    latent = sum(half.output_proj(half.input_proj(latent)) for half in halves)
    latent = mimi.decoder_transformer(mimi._to_encoder_framerate(latent))[0]
    return mimi.decoder(latent)[..., : wav.shape[-1]], wav.new_zeros(())


def save_half(mimi: MimiModel, path: Path) -> None:
    """Writes float16 weights. A codebook keeps its vectors; its usage counts become one."""
    for module in mimi.modules():
        if isinstance(module, EuclideanCodebook):
            module.embedding_sum.copy_(module.embedding)
            module.cluster_usage.fill_(1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().cpu() for key, value in mimi.state_dict().items()}, path)


@torch.no_grad()
def measure(mimi: MimiModel, jsonl_path: Path) -> dict[str, float | list[float]]:
    """Return how well `mimi` (on CPU) rebuilds the recordings of a list, each as one sequence.

    `mel_loss` and `mel_loss_of_silence` are `MelLoss`; `mel_correlation` is that of log-mel
    values (1024 samples, 100 bands) where there is speech; `bits_per_codebook` are entropies.
    """
    loss_function = MelLoss()
    losses, silences, rebuilt_mels, mels, codes = [], [], [], [], []
    for wav in read_wavs(jsonl_path):
        wav = wav[:, : wav.shape[1] // mimi.frame_size * mimi.frame_size]
        target = wav[:, None].float() / 32768
        codes.append(mimi.encode(target))
        rebuilt = mimi.decode(codes[-1])
        losses.append(loss_function(rebuilt, target).item())
        silences.append(loss_function(torch.zeros_like(target), target).item())
        log_mels = [
            (loss_function.mel(x[:, 0], 1024) + _LOG_FLOOR).log() for x in (rebuilt, target)
        ]
        spoken = log_mels[1].amax(1) > math.log(10 * _LOG_FLOOR)
        rebuilt_mels.append(log_mels[0].transpose(1, 2)[spoken])
        mels.append(log_mels[1].transpose(1, 2)[spoken])
    both = torch.stack([torch.cat(rebuilt_mels), torch.cat(mels)])
    # Against each band's own mean, or else the shape that all speech shares would count.
    both = (both - both[1].mean(0)).flatten(1)
    all_codes = torch.cat([code.transpose(0, 1).flatten(1) for code in codes], dim=1)
    return {
        "mel_loss": float(np.mean(losses)),
        "mel_loss_of_silence": float(np.mean(silences)),
        "mel_correlation": torch.corrcoef(both)[0, 1].item(),
        "bits_per_codebook": [_entropy_bits(row, mimi.cardinality) for row in all_codes],
    }


def _entropy_bits(codes: Tensor, cardinality: int) -> float:
    share = torch.bincount(codes, minlength=cardinality).double() / len(codes)
    return -(share * share.clamp(min=1e-12).log2()).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration's Mimi.")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="from demo-data")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--start-from", type=Path, help="weights to train further, quantized")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # all shapes are fixed
    mimi_config = json.loads((args.out.parent / "mimi_config.json").read_text(encoding="utf-8"))
    with no_compile():
        mimi = get_mimi(args.start_from, mimi_config, args.device, NUM_CODEBOOKS)
        length_samples = _SEGMENT_FRAMES * mimi.frame_size
        train_lists = [folder / "train.jsonl" for folder in args.data]
        segments = Segments(train_lists, length_samples, args.device, seed=0)
        train(
            mimi,
            segments,
            minutes=args.minutes,
            batch_size=args.batch_size,
            peak_lr=args.lr,
            unquantized_share=0.0 if args.start_from else _UNQUANTIZED_SHARE,
        )
        save_half(mimi, args.out)
        saved = get_mimi(args.out, mimi_config, "cpu", NUM_CODEBOOKS)
        logger.info(json.dumps(measure(saved, args.data[0] / "eval.jsonl")))


if __name__ == "__main__":
    main()
