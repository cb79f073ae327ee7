"""Audio in the formats that people have: the same samples, wherever reading begins."""

import json
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from data_tools import some_words, speech_like
from torchaudio.functional import resample

from finetune.data import decoders, inspect_audio, inspect_recording, read_audio
from finetune.data.audio_files import Embedded
from finetune.data.decoders import open_decoder
from finetune.data.problems import FileProblem

DURATION_SEC = 12.0


def write_av(
    path: Path,
    codec: str,
    rate_hz: int,
    *,
    options: dict[str, Any] | None = None,
    num_channels: int = 2,
    tags: dict[str, str] | None = None,
) -> Path:
    """Encode with FFmpeg, as people's tools do."""
    samples = speech_like(DURATION_SEC, rate_hz)[:, :num_channels]
    layout = "stereo" if num_channels == 2 else "mono"
    with av.open(str(path), "w", options=options or {}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=rate_hz)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples.T), format="fltp", layout=layout
        )
        frame.sample_rate, frame.time_base, frame.pts = rate_hz, Fraction(1, rate_hz), 0
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate_hz,
                                      frame_size=stream.frame_size or 1024)  # fmt: skip
        for frames in (resampler.resample(frame), resampler.resample(None)):
            for part in frames:
                container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def write_soundfile(path: Path, rate_hz: int, **options: Any) -> Path:
    soundfile.write(path, speech_like(DURATION_SEC, rate_hz), rate_hz, **options)
    return path


def without_length(path: Path, rate_hz: int) -> Path:
    """A wav as a writer leaves it that was stopped: its header says 0 bytes."""
    write_soundfile(path, rate_hz)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", 0)
    path.write_bytes(content)
    return path


FORMATS: dict[str, Any] = {
    "a.m4a": lambda path: write_av(path, "aac", 44100),
    "a.mp4": lambda path: write_av(path, "aac", 24000),
    "a.webm": lambda path: write_av(path, "libopus", 48000),
    "a.opus": lambda path: write_av(path, "libopus", 48000),
    "no length.mp3": lambda path: write_av(path, "libmp3lame", 24000, options={"write_xing": "0"}),
    "variable.mp3": lambda path: write_soundfile(path, 24000, bitrate_mode="VARIABLE"),
    "44100.mp3": lambda path: write_soundfile(path, 44100),
    "a.aiff": lambda path: write_soundfile(path, 24000),
    "a.ogg": lambda path: write_soundfile(path, 24000),
    "no length.wav": lambda path: without_length(path, 24000),
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a format by its name, written once."""
    folder = tmp_path_factory.mktemp("formats")
    return cache(lambda name: FORMATS[name](folder / name))


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_is_that_of_the_whole(recording: Callable[[str], Path], name: str) -> None:
    path = recording(name)
    info = inspect_audio(path)
    assert info.duration_sec == pytest.approx(DURATION_SEC, abs=0.06)
    num_samples = -(-info.num_samples * 24000 // info.sample_rate_hz)
    whole = read_audio(path, 0, 10**6, 24000)
    assert whole.shape == (2, num_samples) and whole.abs().max() > 0.05
    # Backward, forward, with a gap, over the end, and after it.
    for start, length in [(200_000, 1920), (0, 24000), (24000, 24000), (150_001, 777),
                          (150_000, 48000), (num_samples - 100, 1920)]:  # fmt: skip
        part = read_audio(path, start, length, 24000)
        expected = whole[:, start : start + length]
        # The filter of a resampled part is summed in another order.
        tolerance = 0 if info.sample_rate_hz == 24000 else 1e-6
        torch.testing.assert_close(part, expected, atol=tolerance, rtol=0)
    assert read_audio(path, num_samples + 24000, 1920, 24000).shape == (2, 0)


@pytest.mark.parametrize("name", ["a.m4a", "44100.mp3"])
def test_reading_may_begin_anywhere(
    recording: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A worker, or a run that is resumed, reads parts of a file that it has not opened before; the
    part lies blocks behind what a reader may keep."""
    monkeypatch.setattr(decoders, "_BLOCK_SAMPLES", 2**16)
    path = recording(name)
    whole = open_decoder(path).read(0, 10**7)
    num_samples = len(whole)
    assert num_samples > 4 * 2**16
    for parts in [(200_000, 210_000), (250_000, 250_001)], [(5, 50), (num_samples - 99, 10**7)]:
        decoder = open_decoder(path)
        for start, stop in parts:
            assert np.array_equal(decoder.read(start, stop), whole[start:stop])
        assert decoder.read(10**7, 10**7 + 9).shape == (0, 2), "and past the end"
        assert np.array_equal(decoder.read(70_000, 70_009), whole[70_000:70_009])
    assert open_decoder(path).read(10**7, 10**7 + 9).shape == (0, 2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_inside_another_is_read_as_on_the_disk(
    recording: Callable[[str], Path], name: str
) -> None:
    path = recording(name)
    inside = Embedded(f"row 3 of {path}", path, path.read_bytes)
    assert inspect_audio(inside) == inspect_audio(path)
    for start, length in [(24001, 1920), (0, 10**6)]:
        found, wanted = (read_audio(file, start, length, 24000) for file in (inside, path))
        assert torch.equal(found, wanted)
    for content in (b"", b"no audio"):
        broken = Embedded(f"row 4 of {path}, {len(content)}", path, partial(bytes, content))
        with pytest.raises(FileProblem, match=r"row 4 of .* cannot be read"):
            inspect_audio(broken)


def test_what_ffmpeg_decodes_is_what_was_recorded(tmp_path: Path) -> None:
    path = write_av(tmp_path / "a.m4a", "alac", 44100)
    wanted = resample(torch.from_numpy(speech_like(DURATION_SEC, 44100).T), 44100, 24000)
    found = read_audio(path, 0, 10**6, 24000)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4  # 16 bits a sample


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f64le"])
def test_integers_are_fractions_of_full_scale(tmp_path: Path, codec: str) -> None:
    path = write_av(tmp_path / "a.mkv", codec, 24000)
    found = read_audio(path, 0, 24000, 24000).T.numpy()
    assert np.abs(found - speech_like(DURATION_SEC, 24000)[:24000]).max() < 0.01


def found(path: Path, promised_sec: float) -> dict[str, Any]:
    transcript = path.with_suffix(".json")
    transcript.write_text(json.dumps({"alignments": some_words(4.0)}))
    return {
        f.code: f for f in inspect_recording(path, transcript, duration_sec=promised_sec).findings
    }


def test_lengths_as_other_programs_write_them(tmp_path: Path) -> None:
    """They count the padding of codecs, or do not: more of it where frames are longer."""
    low = write_soundfile(tmp_path / "low.mp3", 8000)
    assert found(low, DURATION_SEC + 0.3) == {}
    said = found(low, DURATION_SEC + 0.6)["wrong-duration"].message
    assert "up to 0.43 s of difference are accepted" in said
    high = write_soundfile(tmp_path / "high.wav", 8000)
    assert "up to 0.1 s" in found(high, DURATION_SEC + 0.3)["wrong-duration"].message


@pytest.mark.parametrize("name", ["no length.mp3", "no length.wav"])
def test_a_header_without_length_is_named(tmp_path: Path, name: str) -> None:
    path = FORMATS[name](tmp_path / name)
    finding = found(path, inspect_audio(path).duration_sec)["no-length-in-header"]
    assert finding.severity == "warning" and "does not say how long it is" in finding.message


def test_video_without_sound_and_text_are_no_recordings(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(FileProblem, match="holds no audio"):
        inspect_audio(path)
    path.write_text("hello")
    with pytest.raises(FileProblem, match="cannot be read"):
        inspect_audio(path)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.m3u8"])
def test_a_playlist_is_not_followed(tmp_path: Path, name: str) -> None:
    write_av(tmp_path / "secret.m4a", "aac", 24000)
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:12", "#EXTINF:12,", "secret.m4a", "#EXT-X-ENDLIST"]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(FileProblem, match="cannot be read"):
        inspect_audio(tmp_path / name)
    (tmp_path / name).write_text(f"ffconcat version 1.0\nfile '{tmp_path}/secret.m4a'\n")
    with pytest.raises(FileProblem, match="cannot be read"):
        inspect_audio(tmp_path / name)


def test_a_mono_video_is_refused_as_a_mono_wav_is(tmp_path: Path) -> None:
    path = write_av(tmp_path / "a.mp4", "aac", 24000, num_channels=1)
    with pytest.raises(FileProblem, match="is mono"):
        inspect_audio(path)
    assert inspect_audio(path, channels=(1, 2)).num_channels == 1


def m4a_with_latin_1_title(folder: Path) -> Path:
    path = write_av(folder / "a.m4a", "aac", 24000, tags={"title": "CafXXX"})
    content = path.read_bytes()
    assert b"CafXXX" in content
    path.write_bytes(content.replace(b"CafXXX", b"Caf\xe9 1"))
    return path


def mp3_with_latin_1_title(folder: Path) -> Path:
    path = FORMATS["no length.mp3"](folder / "a.mp3")
    tag = b"TAG" + b"Gespr\xe4ch".ljust(30, b"\0") + bytes(94) + b"\xff"
    path.write_bytes(path.read_bytes() + tag)
    return path


@pytest.mark.parametrize("write", [m4a_with_latin_1_title, mp3_with_latin_1_title])
def test_tags_may_be_in_any_encoding(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    assert inspect_audio(path).duration_sec == pytest.approx(DURATION_SEC, abs=0.2)
    assert float(read_audio(path, 24000, 24000, 24000).std()) > 0.01


def test_a_codec_that_nobody_knows_is_damage(tmp_path: Path) -> None:
    path = write_soundfile(tmp_path / "a.wav", 24000)
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\x34\x12" + content[22:])  # the wav's format tag
    with pytest.raises(FileProblem, match=r"no decoder knows its codec.*convert it again"):
        inspect_audio(path)
