"""The layouts that people have: each is checked, encoded and trained as the same stereo files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layout_tools
import numpy as np
import pytest
import soundfile
import torch
from layout_tools import LAYOUTS, lhotse_cuts, loaded, mono_pairs, samples_of, words_of
from recordings_tools import call, findings_of
from training_tools import logged, train

from finetune.config import load_config
from finetune.data import list_entries
from finetune.data.decoders import ForwardDecoder
from finetune.encode import encode_data
from finetune.errors import UserError

# Fixtures: pytest finds them by their names in this module.
stereo = layout_tools.stereo


# --- the same dialogues in each layout ------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda write: write.__name__)
def layout(
    request: pytest.FixtureRequest, stereo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("layout")
    yield request.param.__name__, request.param(folder, stereo)


def test_it_is_what_the_stereo_files_are(layout: tuple[str, Path], stereo: Path) -> None:
    name, path = layout
    assert torch.equal(loaded(path), loaded(stereo))
    if name == "parquet_codes":
        return  # the text of one side alone
    both = loaded(path, swap_channels=True)
    assert torch.equal(both, loaded(stereo, swap_channels=True))


def test_main_channel(layout: tuple[str, Path], stereo: Path) -> None:
    """Where channels tell who is who, the right one may be Moshi; names of files and columns say it
    themselves."""
    name, path = layout
    right = loaded(path, main_channel="right")
    if name in ("mono_pairs", "saved_dataset_of_two"):
        assert torch.equal(right, loaded(stereo))
    elif name.startswith("lhotse"):
        assert torch.equal(right, loaded(stereo, swap_channels=True)[4:]), "and words go with them"
    else:
        assert torch.equal(right, loaded(stereo, main_channel="right"))


EVALUATED: dict[str, Any] = {"do_eval": True, "eval_freq": 4, "health_sec": 0}


@pytest.fixture(scope="module")
def run_on_stereo(stereo: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("same")
    train(config, run_dir, {**EVALUATED, "data.train_data": stereo, "data.eval_data": stereo})
    return run_dir


def test_it_is_checked_encoded_and_trained(
    layout: tuple[str, Path],
    stereo: Path,
    run_on_stereo: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, path = layout
    for thoroughness in ([], ["--fast"]):
        status, found = findings_of(path, *thoroughness)
        assert status == 0 and set().union(*found.values()) == set() and len(found) > 1, found
    assert call("data", "stats", path, "--workers=1") == 0
    shown = call("data", "show", path, "--out", tmp_path / "a.png", "--duration_sec=1")
    if name.startswith("parquet"):
        assert shown == 1 and "has no audio, only codes" in capsys.readouterr().err
    else:
        samples = soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
        assert shown == 0 and np.array_equal(samples[:24000], samples_of(stereo, 0)[:24000])
    options = {"data.train_data": path, "data.cache_dir": tmp_path / "cache"}
    num_segments = 0 if name.startswith("parquet") else 4
    for expected in (num_segments, 0):
        encode_data(load_config(config, options))
        assert f"{expected} of 4 segments are to be encoded" in capsys.readouterr().out
    options |= EVALUATED | {"data.eval_data": path, "data.num_workers": 1}
    train(config, tmp_path / "run", options)
    assert logged(tmp_path / "run") == logged(run_on_stereo)
    assert logged(tmp_path / "run", kind="eval") == logged(run_on_stereo, kind="eval")
    assert set(logged(tmp_path / "run", "encoded_segments")) == {0}


# --- names, words, rates and lengths --------------------------------------------------------------


def test_a_manifest_of_lhotse_under_another_name(tmp_path: Path, stereo: Path) -> None:
    path = lhotse_cuts(tmp_path, stereo)
    path = path.rename(path.with_name("train.jsonl.gz"))
    with pytest.raises(UserError, match=r"give it a name such as cuts\.jsonl\.gz"):
        loaded(path)


def test_words_of_both_in_one_transcript(tmp_path: Path, stereo: Path) -> None:
    """Without a transcript beside the user's file, Moshi's holds the words of both."""
    path = mono_pairs(tmp_path, stereo)
    for index in range(3):
        (tmp_path / f"{index}_user.json").unlink()
        (tmp_path / f"{index}_moshi.json").write_text(json.dumps({"alignments": words_of(index)}))
    assert torch.equal(loaded(path, swap_channels=True), loaded(stereo, swap_channels=True))


def test_a_pair_may_have_two_rates_and_lengths(tmp_path: Path, stereo: Path) -> None:
    """Each file is resampled by itself, and the shorter one ends in silence."""
    path = mono_pairs(tmp_path, stereo)
    samples = samples_of(stereo, 0)[:, 1]
    soundfile.write(tmp_path / "0_user.wav", samples[:-960:2], 12000)
    assert findings_of(path)[1]["0_moshi"] == set()
    recording = list_entries(path, "data")[0].recording
    assert recording is not None
    audio = recording.read_audio(0, 10**6, 24000)
    assert audio.shape == (2, 48000) and not audio[1, -960:].any() and audio[1, -1200:].any()


def test_a_pair_that_is_decoded_from_its_start_is_decoded_once(
    tmp_path: Path, stereo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mono_pairs(tmp_path, stereo)
    for side in ("moshi", "user"):
        samples, rate_hz = soundfile.read(tmp_path / f"0_{side}.wav")
        soundfile.write(tmp_path / f"0_{side}.mp3", samples, rate_hz)
    path.write_text(path.read_text().replace('0_moshi.wav"', '0_moshi.mp3"')
                    .replace('0_user.wav"', '0_user.mp3"'))  # fmt: skip
    recording = list_entries(path, "data")[0].recording
    assert recording is not None
    restarts: list[Any] = []
    restart = ForwardDecoder._restart

    def noted(decoder: ForwardDecoder) -> None:
        restarts.append(decoder.path)
        restart(decoder)

    monkeypatch.setattr(ForwardDecoder, "_restart", noted)
    parts = [recording.read_audio(start, 4800, 24000) for start in range(0, 48000, 4800)]
    assert sorted(path.name for path in restarts) == ["0_moshi.mp3", "0_user.mp3"]
    assert torch.equal(torch.cat(parts, dim=1), recording.read_audio(0, 48000, 24000))
