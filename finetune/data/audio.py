"""Recordings: what their headers promise, and exact reading from the middle."""

import math
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from finetune.data.audio_files import AudioFile, for_decoder
from finetune.data.decoders import (
    Decoder,
    ForwardDecoder,
    SeekingDecoder,
    decoder_of,
    open_decoder,
    wav_is_cut_off,
)
from finetune.data.problems import FileProblem, damaged

# `torchaudio.functional.resample`: its filter spans this many zero crossings, and cuts off at
# this fraction of the lower of the two Nyquist frequencies. Named here because `read_audio` must
# know how far the filter reaches.
_FILTER_WIDTH = 6
_ROLLOFF = 0.99

# The resampler's kernel has a value for each phase and tap. Rates with a large common divisor need
# few (44.1 kHz to 24 kHz: 12 thousand), those without one gigabytes.
_MAX_KERNEL_VALUES = 2**25
MIMI_RATE_HZ = 24000

_STEREO_REMEDY = (
    "stereo with Moshi on the left and the user on the right, for example by "
    "`ffmpeg -i moshi.wav -i user.wav -filter_complex amerge=inputs=2 -ac 2 both.wav` "
    "or `sox -M moshi.wav user.wav both.wav`"
)


@dataclass(frozen=True)
class AudioInfo:
    """Length of a recording: in samples of each channel, at its own rate."""

    num_samples: int
    sample_rate_hz: int
    num_channels: int = 2
    is_exact: bool = True
    """Whether the file says its length in samples; in other formats programs differ in what they
    count, by a few frames of the codec."""

    @property
    def duration_sec(self) -> float:
        return self.num_samples / self.sample_rate_hz


def inspect_audio(path: AudioFile, *, channels: Collection[int] | None = (2,)) -> AudioInfo:
    """Return the length of a recording, after checking that it can be read to its end.

    Of wav, flac and the like it reads the header and the last sample only. What has no length in
    its header is decoded.

    Args:
        channels: how many it may have; None: any number.

    Raises:
        FileProblem: missing, not readable as audio, truncated, or with other channels.
    """
    if isinstance(path, Path) and not path.is_file():
        same = _other_spelling(path)
        raise FileProblem(
            f"recording {path} is missing",
            same or "correct the path",
            code="missing",
            may_be_left_out=same is None,
        )
    try:
        return _inspect(path, decoder_of(path), channels)
    except (soundfile.SoundFileError, OSError) as error:
        raise damaged(f"recording {path} cannot be read ({error})") from None


def _inspect(path: AudioFile, decoder: Decoder, channels: Collection[int] | None) -> AudioInfo:
    rate, num_channels = decoder.sample_rate_hz, decoder.num_channels
    if channels is not None and num_channels not in channels:
        kind = "mono" if num_channels == 1 else f"made of {num_channels} channels"
        if 2 in channels:
            expected = "expected mono, or " if 1 in channels else "expected "
            remedy = expected + _STEREO_REMEDY
            raise FileProblem(f"recording {path} is {kind}", remedy, code="not-stereo")
        remedy = "name files that hold one speaker each, or one stereo file instead of two"
        raise FileProblem(f"recording {path} is {kind}, not mono", remedy, code="not-mono")
    num_samples = decoder.num_samples
    if (num_samples or 0) < 0 or rate < 1:
        raise damaged(f"recording {path} has a header that makes no sense")
    _require_resampler(path, rate, MIMI_RATE_HZ)
    if num_samples is None:
        assert isinstance(decoder, ForwardDecoder)
        num_samples = decoder.count()
    elif _is_truncated(path, decoder, num_samples):
        raise damaged(
            f"recording {path} is truncated, its header promises more audio than the file holds",
            code="truncated",
        )
    return AudioInfo(num_samples, rate, num_channels, isinstance(decoder, SeekingDecoder))


def _other_spelling(path: Path) -> str | None:
    """Return what to do about a file that is there under a name that only looks the same."""
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, path.name)
        if name != path.name and path.with_name(name).is_file():
            return (
                "a file whose name looks the same is there, but its letters are in the Unicode "
                f"form {form}; write the name in that form, or rename the file"
            )
    return None


def _require_resampler(path: AudioFile, rate_hz: int, new_rate_hz: int) -> None:
    divisor = math.gcd(rate_hz, new_rate_hz)
    if rate_hz // divisor * (new_rate_hz // divisor) > _MAX_KERNEL_VALUES:
        raise FileProblem(
            f"recording {path} has {rate_hz} samples a second, from which there is no exact way to "
            f"{new_rate_hz} within reasonable memory",
            f"convert it, for example by `ffmpeg -i in.wav -ar {new_rate_hz} out.wav`",
            code="rate",
            may_be_left_out=True,
        )


def _is_truncated(path: AudioFile, decoder: Decoder, num_samples: int) -> bool:
    if wav_is_cut_off(path):
        return True
    if num_samples == 0:
        return False
    try:
        if isinstance(decoder, SeekingDecoder):
            return len(decoder.read(num_samples - 1, num_samples)) < 1
        with soundfile.SoundFile(for_decoder(path)) as file:
            file.seek(num_samples - 1)
            return len(file.read(1)) < 1
    except soundfile.SoundFileError:
        return True


def read_audio(
    path: AudioFile, start_sample: int, num_samples: int, sample_rate_hz: int
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
        return _read_resampled(decoder_of(path), path, start_sample, num_samples, sample_rate_hz)
    except (soundfile.SoundFileError, OSError) as error:
        raise damaged(f"recording {path} cannot be read ({error})") from None


class AudioReader:
    """A reader of one recording holds its own decoder, so that many can be read in turns; what
    cannot be decoded from the middle is decoded once.

    Raises:
        FileProblem: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._decoder = open_decoder(path)
        except (soundfile.SoundFileError, OSError) as error:
            raise damaged(f"recording {path} cannot be read ({error})") from None

    def read(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        """Read a part of it, as `read_audio` does."""
        where = start_sample, num_samples, sample_rate_hz
        try:
            return _read_resampled(self._decoder, self.path, *where)
        except (soundfile.SoundFileError, OSError) as error:
            problem = f"recording {self.path} cannot be read ({error})"
            raise damaged(problem) from None

    def close(self) -> None:
        self._decoder.close()


def _read_resampled(
    decoder: Decoder, path: AudioFile, start_sample: int, num_samples: int, new_rate_hz: int
) -> torch.Tensor:
    # Every `old` samples in give `new` samples out. Reading from a multiple of `old` leaves the
    # phase of the filter as it would be in the whole recording.
    _require_resampler(path, decoder.sample_rate_hz, new_rate_hz)
    divisor = math.gcd(decoder.sample_rate_hz, new_rate_hz)
    old, new = decoder.sample_rate_hz // divisor, new_rate_hz // divisor
    stop_sample = start_sample + num_samples

    reach = math.ceil(_FILTER_WIDTH * old / (min(old, new) * _ROLLOFF)) if old != new else 0
    margin_blocks = -(-reach // old)
    first_block = max(0, start_sample // new - margin_blocks)
    start, stop = first_block * old, (-(-stop_sample // new) + margin_blocks) * old
    if decoder.num_samples is not None:
        stop = min(stop, decoder.num_samples)

    samples = decoder.read(start, stop)
    end = start + len(samples)
    if end < stop:
        if decoder.num_samples is not None:
            raise damaged(f"recording {path} ends before its header says")
        stop = end
    if not np.isfinite(samples).all():
        raise damaged(f"recording {path} holds samples that are not numbers")
    stop_sample = min(stop_sample, -(-stop * new // old))
    audio = torch.from_numpy(samples.T.copy())
    if old != new and audio.shape[1]:
        audio = resample(audio, old, new, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF)
    offset = first_block * new
    return audio[:, start_sample - offset : max(start_sample, stop_sample) - offset]
