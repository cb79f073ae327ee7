"""Audio files as samples at their own rate, exact wherever reading begins.

libsndfile seeks exactly in wav, flac, Ogg Vorbis, AIFF and the like. In mp3 and Opus a decoder that
begins in the middle gives other samples than one that has come there, so these are decoded from
their start, always. What libsndfile cannot read, or whose length it can only guess (an mp3 without
a Xing header, a wav whose writer was stopped), FFmpeg decodes through PyAV, from the start as well.
"""

import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from finetune.data.audio_files import AudioFile, for_decoder, num_bytes, opened, state_of
from finetune.data.problems import damaged

if TYPE_CHECKING:
    import av

# Programs that write a wav into a pipe cannot know its length and leave a placeholder of about
# 2^31 or 2^32 bytes.
_UNKNOWN_WAV_BYTES = 0x7FFF0000

_AV_BLOCK_SAMPLES = 2**16
_MARGIN_SAMPLES = 2**16
"""How far before its part a reader may begin, to resample it."""

# What holds audio itself. FFmpeg also reads playlists, which lead to other files and places.
_AV_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,webm,"
    "mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv",
}

_BLOCK_SAMPLES = 2**23
"""libmpg123 rounds otherwise after every call (in the last bit of a float). In one call, which is
for nearly all files, the samples are those that any program gets that reads the whole file."""


class Decoder(ABC):
    """An open audio file.

    Attributes:
        num_samples: of each channel; None: it is known at the end of the file alone.
    """

    sample_rate_hz: int
    num_channels: int
    num_samples: int | None

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Float32 `[at most stop − start, num_channels]`; shorter at the file's end.

        Raises:
            FileProblem: the file is corrupt.
        """

    @abstractmethod
    def close(self) -> None: ...


class SeekingDecoder(Decoder):
    """Reads a part of a file that libsndfile seeks in exactly."""

    def __init__(self, file: soundfile.SoundFile) -> None:
        self._file = file
        self.sample_rate_hz, self.num_channels = file.samplerate, file.channels
        self.num_samples = file.frames

    def read(self, start: int, stop: int) -> np.ndarray:
        start = min(start, self._file.frames)
        self._file.seek(start)
        samples: np.ndarray = self._file.read(max(0, stop - start), dtype="float32", always_2d=True)
        return samples

    def close(self) -> None:
        self._file.close()


class ForwardDecoder(Decoder):
    """Decodes a file from its start, again for every part that lies before the last one."""

    def __init__(self, path: AudioFile) -> None:
        self.path = path
        self._blocks: Iterator[np.ndarray] | None = None
        self._kept: np.ndarray = np.zeros((0, 0), np.float32)
        """The samples before `_end`."""
        self._end = 0

    @abstractmethod
    def _decode(self) -> Iterator[np.ndarray]:
        """Yield float32 `[n, num_channels]` from the start to the end."""

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._blocks is None or start < self._end - len(self._kept):
            self._restart()
        assert self._blocks is not None
        parts = [self._kept]
        first = self._end - len(self._kept)
        while self._end < stop:
            block = next(self._blocks, None)
            if block is None:
                break
            parts.append(block)
            self._end += len(block)
            # What is read next may begin a margin before this part.
            while len(parts) > 1 and first + len(parts[0]) <= start - _MARGIN_SAMPLES:
                first += len(parts.pop(0))
        self._kept = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._kept[max(0, start - first) : max(0, stop - first)]

    def count(self) -> int:
        """Decode all of it and return the number of samples of each channel."""
        with closing(self._decode()) as blocks:  # type: ignore[type-var]
            return sum(len(block) for block in blocks)

    def _restart(self) -> None:
        self.close()
        self._blocks = self._decode()
        self._kept = np.zeros((0, self.num_channels), np.float32)
        self._end = 0

    def close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()  # type: ignore[attr-defined]
        self._blocks = None


class SequentialDecoder(ForwardDecoder):
    """Reads what libsndfile decodes exactly only from the start."""

    def __init__(self, path: AudioFile, file: soundfile.SoundFile) -> None:
        super().__init__(path)
        self.sample_rate_hz, self.num_channels = file.samplerate, file.channels
        self.num_samples = file.frames

    def _decode(self) -> Iterator[np.ndarray]:
        with soundfile.SoundFile(for_decoder(self.path)) as file:
            file.seek(0)  # its first frame was decoded to find the format, and is rounded otherwise
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                yield block


class AvDecoder(ForwardDecoder):
    """Decodes with FFmpeg, through PyAV, what libsndfile cannot."""

    def __init__(self, path: AudioFile) -> None:
        super().__init__(path)
        with _av_stream(path) as (_, stream):
            self.sample_rate_hz, self.num_channels = stream.rate, stream.channels
        self.num_samples = None

    def _decode(self) -> Iterator[np.ndarray]:
        block: list[np.ndarray] = []
        with _av_stream(self.path) as (container, stream):
            for frame in container.decode(stream):
                if (frame.rate, frame.layout.nb_channels) != (
                    self.sample_rate_hz,
                    self.num_channels,
                ):
                    raise damaged(
                        f"recording {self.path} changes its rate or its channels on the way"
                    )
                block.append(_float_samples(frame, self.num_channels))
                if sum(map(len, block)) >= _AV_BLOCK_SAMPLES:
                    yield np.concatenate(block)
                    block.clear()
        if block:
            yield np.concatenate(block)


def _float_samples(frame: "av.AudioFrame", num_channels: int) -> np.ndarray:
    """Samples of a frame: float32 `[n, num_channels]`, integers as fractions of full scale."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, num_channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
        return (samples / full_scale).astype(np.float32)
    return np.ascontiguousarray(samples, dtype=np.float32)


@contextmanager
def _av_stream(
    path: AudioFile,
) -> Iterator[tuple["av.container.InputContainer", "av.AudioStream"]]:
    """Open the first audio stream of a file for FFmpeg.

    Raises:
        FileProblem: FFmpeg cannot read it either, also in the middle; or there is no audio in it.
    """
    import av  # many data sets do without

    try:
        # A name as "file:…" leads to a file, whatever protocol it looks like.
        source = f"file:{path}" if isinstance(path, Path) else opened(path)
        # Tags may be in any encoding, as those of old mp3 are; nothing is made of them.
        with av.open(source, options=_AV_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise damaged(f"recording {path} holds no audio")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise damaged(f"recording {path} cannot be read (no decoder knows its codec)")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise damaged(f"recording {path} cannot be read ({reason})") from None


def open_decoder(path: AudioFile) -> Decoder:
    """Open an audio file with the decoder that reads it exactly.

    Raises:
        FileProblem: nothing reads it.
    """
    try:
        file = soundfile.SoundFile(for_decoder(path))
    except (soundfile.SoundFileError, OSError):
        return AvDecoder(path)
    if lacks_length(path):
        file.close()
        return AvDecoder(path)
    if file.subtype in ("MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III", "OPUS"):
        with file:
            return SequentialDecoder(path, file)
    return SeekingDecoder(file)


class _Kept(threading.local):
    """Open decoders of a thread, the one that was used last at the end."""

    def __init__(self) -> None:
        self.decoders: dict[tuple[object, ...], Decoder] = {}


_kept = _Kept()
_MAX_KEPT = 2
"""A dialogue may be in two files, which are read in turns."""


def decoder_of(path: AudioFile) -> Decoder:
    """An open decoder of a file, kept by each thread until it has opened two others or the file
    changes: parts that follow one another are decoded once."""
    # Not those of the process that this one was forked from: they share their place in the file.
    version = (os.getpid(), str(path), state_of(path))
    decoders = _kept.decoders
    decoder = decoders.pop(version, None)
    if decoder is None:
        while len(decoders) >= _MAX_KEPT:
            decoders.pop(next(iter(decoders))).close()
        decoder = open_decoder(path)
    decoders[version] = decoder
    return decoder


# --- headers --------------------------------------------------------------------------------------


def lacks_length(path: AudioFile) -> bool:
    """Return whether a file's header says nothing of its length, so that libsndfile guesses: a wav
    whose writer was stopped, or an mp3 without a Xing, Info or VBRI header."""
    with opened(path) as file:
        start = file.read(12)
        if start[:4] == b"RIFF":
            data = wav_data(path)
            return data is not None and data[1] == 0 and num_bytes(path) > data[0]
        if start[:3] == b"ID3":
            # The size is in four bytes of seven bits.
            size = 0
            for byte in start[6:10]:
                size = size << 7 | byte & 0x7F
            file.seek(10 + size)
            start = file.read(12)
        is_mp3 = len(start) > 1 and start[0] == 0xFF and start[1] & 0xE6 == 0xE2
        if not is_mp3:
            return False
        frame = start + file.read(256)
        return not any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def wav_data(path: AudioFile) -> tuple[int, int] | None:
    """Return where the samples of a wav file begin, and how many bytes its header promises; None
    for other files."""
    with opened(path) as file:
        if file.read(12)[0:4] != b"RIFF":
            return None
        while len(header := file.read(8)) == 8:
            name, num_bytes = struct.unpack("<4sI", header)
            if name == b"data":
                return file.tell(), num_bytes
            file.seek(num_bytes + num_bytes % 2, 1)
    return None


def wav_is_cut_off(path: AudioFile) -> bool:
    """Return whether a wav ends before its header says. libsndfile quietly takes what there is as
    the whole, so it has to be asked here."""
    data = wav_data(path)
    if data is None or not 0 < data[1] < _UNKNOWN_WAV_BYTES:
        return False
    return sum(data) > num_bytes(path)
