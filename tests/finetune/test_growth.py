"""Nothing grows with the length of a run or of a dialogue but what has to."""

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from training_tools import REPOSITORY

from finetune.config import load_config
from finetune.data import FRAME_RATE_HZ
from finetune.model import build_codec, find_checkpoint, plan_model

pytestmark = pytest.mark.slow


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which does the same for longer."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("growth")


def test_steps_evaluations_and_speech_leave_nothing_behind(
    growth: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = growth.measure(tmp_path, num_steps=200, num_evaluations=20, minutes=1)
    assert flat == [True, True, True], capsys.readouterr().out


def test_what_grows_is_noticed(growth: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    held: list[Any] = []
    assert not growth.watched("0.2 MB a step", 200, lambda: held.append(b"x" * 200_000))
    with contextlib.ExitStack() as opened:
        assert not growth.watched(
            "files", 60, lambda: opened.enter_context(Path("/dev/null").open())
        )
    assert growth.watched("nothing", 60, lambda: None)
    assert capsys.readouterr().out.count("GROWS") == 2


def kilobytes(key: str) -> int:
    """Of this process, from the system."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key))


def peak_mb(function: Callable[[], Any]) -> float:
    """What `function` takes at most, beside what is there already."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    function()
    return (kilobytes("VmHWM") - before) / 1024


def test_the_memory_of_decoding_is_linear_in_the_duration(config: Path) -> None:
    """Mimi's attention over all frames at once has a mask of T x T: half an hour took 20 GB."""
    args = load_config(config)
    info = find_checkpoint(args.moshi_paths)
    codec = build_codec(info, plan_model(args, info), "cpu")

    def decode(minutes: float) -> None:
        codes = torch.zeros(1, 4, round(minutes * 60 * FRAME_RATE_HZ), dtype=torch.int64)
        audio = codec.decode(codes)
        assert audio.shape[-1] == minutes * 60 * codec.sample_rate_hz

    decode(2)
    audio_mb = 5 * 60 * codec.sample_rate_hz * 4 / 2**20
    five, ten = peak_mb(lambda: decode(5)), peak_mb(lambda: decode(10))
    # Its pieces, and all of it once more; a mask would take 160 MB more for ten minutes, at least.
    assert ten - five < 3 * audio_mb + 20
