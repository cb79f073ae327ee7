"""What `moshi-ttt generate` says of recordings that cannot be read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings_tools import call
from training_tools import checkpoint


@pytest.fixture
def trained(finished_run: Callable[..., Path], tmp_path: Path) -> Path:
    return checkpoint(finished_run(tmp_path / "run"), 4)


@pytest.mark.parametrize("damage", ["is truncated", "holds samples that are not numbers"])
@pytest.mark.parametrize(
    ("audio", "more", "remedy"),
    [
        ("in/a.wav", "--out={tmp}/out.wav", "copy or convert it again"),
        ("in/a.wav", "--prompt_sec=0.1", "copy or convert it again"),
        ("in", "--out={tmp}/out", "copy or convert it again, or move it out of {tmp}/in"),
    ],
    ids=["answered", "continued", "in a folder"],
)
def test_what_to_do_fits_where_a_bad_recording_was_found(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    audio: str,
    more: str,
    remedy: str,
    damage: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "in/a.wav"
    bad.parent.mkdir()
    samples = np.full((4000, 2), np.nan if "numbers" in damage else 0.1)
    soundfile.write(bad, samples, 24000, subtype="FLOAT")
    if "truncated" in damage:
        bad.write_bytes(bad.read_bytes()[:3000])
    words = [f"--audio={tmp_path / audio}", more.format(tmp=tmp_path)]
    assert call("generate", f"--checkpoint={trained}", "--device=cpu", *words) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if damage in each]
    assert line.endswith(f": {remedy.format(tmp=tmp_path)}"), line
