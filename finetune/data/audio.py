"""Stereo recordings: what their headers promise, and exact reading from the middle."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from .problems import FileProblem

# `torchaudio.functional.resample`: its filter spans this many zero crossings, and cuts off at
# this fraction of the lower of the two Nyquist frequencies. Named here because `read_audio` must
# know how far the filter reaches.
_FILTER_WIDTH = 6
_ROLLOFF = 0.99

# Programs that write a wav into a pipe cannot know its length and leave a placeholder of about
# 2^31 or 2^32 bytes.
_UNKNOWN_WAV_BYTES = 0x7FFF0000

# The resampler's kernel has a value for each phase and tap. Rates with a large common divisor need
# few (44.1 kHz to 24 kHz: 12 thousand), those without one gigabytes.
_MAX_KERNEL_VALUES = 2**25
MIMI_RATE_HZ = 24000

_STEREO_REMEDY = (
    "expected stereo with Moshi on the left and the user on the right, for example by "
    "`ffmpeg -i moshi.wav -i user.wav -filter_complex amerge=inputs=2 -ac 2 both.wav` "
    "or `sox -M moshi.wav user.wav both.wav`"
)
_COPY_REMEDY = "copy or convert it again, or remove its line"


@dataclass(frozen=True)
class AudioInfo:
    """Length of a recording: in samples of each channel, at its own rate."""

    num_samples: int
    sample_rate_hz: int

    @property
    def duration_sec(self) -> float:
        return self.num_samples / self.sample_rate_hz


def inspect_audio(path: Path, *, allow_mono: bool = False) -> AudioInfo:
    """The length of a stereo recording, after checking that it can be read to its end.

    Reads the header and the last sample only.

    Raises:
        FileProblem: missing, not readable as audio, truncated, or not stereo.
    """
    if not path.is_file():
        raise FileProblem(f"recording {path} is missing: correct the path or remove the line")
    try:
        with soundfile.SoundFile(path) as file:
            num_samples, rate, num_channels = file.frames, file.samplerate, file.channels
    except (soundfile.SoundFileError, OSError) as error:
        raise FileProblem(f"recording {path} cannot be read ({error}): {_COPY_REMEDY}") from None
    if num_channels != 2 and not (allow_mono and num_channels == 1):
        kind = "mono" if num_channels == 1 else f"made of {num_channels} channels"
        raise FileProblem(f"recording {path} is {kind}: {_STEREO_REMEDY}")
    if num_samples < 0 or rate < 1:
        raise FileProblem(f"recording {path} has a header that makes no sense: {_COPY_REMEDY}")
    _require_resampler(path, rate, MIMI_RATE_HZ)
    if _is_truncated(path, num_samples):
        raise FileProblem(
            f"recording {path} is truncated, its header promises more audio than the file holds: "
            f"{_COPY_REMEDY}"
        )
    return AudioInfo(num_samples, rate)


def _require_resampler(path: Path, rate_hz: int, new_rate_hz: int) -> None:
    divisor = math.gcd(rate_hz, new_rate_hz)
    if rate_hz // divisor * (new_rate_hz // divisor) > _MAX_KERNEL_VALUES:
        raise FileProblem(
            f"recording {path} has {rate_hz} samples a second, from which there is no exact way to "
            f"{new_rate_hz} within reasonable memory: convert it, for example by "
            f"`ffmpeg -i in.wav -ar {new_rate_hz} out.wav`, or remove its line"
        )


def _is_truncated(path: Path, num_samples: int) -> bool:
    promised_end = _wav_data_end_bytes(path)
    if promised_end is not None and promised_end > path.stat().st_size:
        return True
    if num_samples == 0:
        return False
    try:
        with soundfile.SoundFile(path) as file:
            file.seek(num_samples - 1)
            return len(file.read(1)) < 1
    except soundfile.SoundFileError:
        return True


def _wav_data_end_bytes(path: Path) -> int | None:
    """Return where the samples of a wav file must end by its own header; None if it does not say.

    libsndfile quietly takes what there is of a truncated wav as the whole, so it has to be asked
    here.
    """
    with path.open("rb") as file:
        if file.read(12)[0:4] != b"RIFF":
            return None
        while len(header := file.read(8)) == 8:
            name, num_bytes = struct.unpack("<4sI", header)
            if name == b"data":
                known = 0 < num_bytes < _UNKNOWN_WAV_BYTES
                return file.tell() + num_bytes if known else None
            file.seek(num_bytes + num_bytes % 2, 1)
    return None


def read_audio(
    path: Path, start_sample: int, num_samples: int, sample_rate_hz: int
) -> torch.Tensor:
    """Part of a recording, resampled: float32 `[num_channels, at most num_samples]`.

    The samples are those of the whole recording resampled to `sample_rate_hz` and then cut (to
    rounding), although only the part and a margin are read. Shorter at the recording's end.

    Args:
        start_sample, num_samples: counted at `sample_rate_hz`.

    Raises:
        FileProblem: the file cannot be read, or holds less than its header promises.
    """
    try:
        with soundfile.SoundFile(path) as file:
            return _read_resampled(file, path, start_sample, num_samples, sample_rate_hz)
    except (soundfile.SoundFileError, OSError) as error:
        raise FileProblem(f"recording {path} cannot be read ({error}): {_COPY_REMEDY}") from None


def _read_resampled(
    file: soundfile.SoundFile, path: Path, start_sample: int, num_samples: int, new_rate_hz: int
) -> torch.Tensor:
    # Every `old` samples in give `new` samples out. Reading from a multiple of `old` leaves the
    # phase of the filter as it would be in the whole recording.
    _require_resampler(path, file.samplerate, new_rate_hz)
    divisor = math.gcd(file.samplerate, new_rate_hz)
    old, new = file.samplerate // divisor, new_rate_hz // divisor
    total_samples = -(-file.frames * new // old)
    stop_sample = min(start_sample + num_samples, total_samples)

    reach = math.ceil(_FILTER_WIDTH * old / (min(old, new) * _ROLLOFF)) if old != new else 0
    margin_blocks = -(-reach // old)
    first_block = max(0, start_sample // new - margin_blocks)
    last_block = -(-stop_sample // new) + margin_blocks
    start, stop = first_block * old, min(last_block * old, file.frames)

    file.seek(start)
    samples = file.read(stop - start, dtype="float32", always_2d=True)
    if len(samples) < stop - start:
        raise FileProblem(f"recording {path} ends before its header says: {_COPY_REMEDY}")
    if not np.isfinite(samples).all():
        raise FileProblem(f"recording {path} holds samples that are not numbers: {_COPY_REMEDY}")
    audio = torch.from_numpy(samples.T.copy())
    if old != new:
        audio = resample(audio, old, new, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF)
    offset = first_block * new
    return audio[:, start_sample - offset : stop_sample - offset]
