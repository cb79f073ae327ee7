"""Benchmarks of a base in fewer bits run, and say what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


def test_a_model_within_the_memory_of_a_small_gpu_trains_and_streams(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_gpu, path = program("small_gpu"), tmp_path / "small.json"
    words = ["--model=tiny", "--device=cpu", "--frames=40", "--rank=4", "--lr=3e-3"]
    words += ["--warmup=1", "--steps=2", "--stream-frames=20", "--dtype=float32"]
    small_gpu.main([*words, "--json", str(path)])
    load, train, stream = json.loads(path.read_text())["results"]
    assert train["losses"][-1] < train["losses"][0] and train["tokens_per_sec"] > 0
    assert train["planned_gb"] > 0 and stream["median_ms"] > 0 and load["sec"] > 0
    step = small_gpu.OurRun.step
    losses = iter([5.0, 5.0, float("nan")])
    monkeypatch.setattr(small_gpu.OurRun, "step", lambda *args: step(*args) * 0 + next(losses))
    found = small_gpu.main(words)
    assert "wrong" in found[1] and "step_sec" not in found[1]


STEP = ["--model=tiny", "--device=cpu", "--dtype=float32", "--batch=2", "--frames=20", "--rank=4"]
STEP += ["--warmup=1", "--steps=1", "--arms", "ours, nf4"]


def test_a_step_with_a_base_in_fewer_bits_is_timed_and_marked_if_its_loss_is_another(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = program("train_step")
    step = train_step.OurRun.step
    monkeypatch.setattr(train_step.OurRun, "step", lambda *args: step(*args) + 1e-2)
    stock, ours = train_step.main(STEP)
    assert ours["step_sec"] > 0 and ours["speedup"] > 0
    assert ours["loss_difference"] == pytest.approx(1e-2, abs=1e-4)
    assert ours["from_stock"] == ours["losses"][0] - stock["losses"][0] != 0
    assert "BEYOND THE BOUND OF 1.0e-05" in capsys.readouterr().out.replace("E-05", "e-05")
    assert train_step.exit_status([stock, ours]) == 1


def test_a_step_is_timed_where_its_plain_form_does_not_fit(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = program("train_step")

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_step, "plain", full)
    _, ours = train_step.main(STEP)
    assert ours["step_sec"] > 0 and "wrong" in ours


def test_peaks_are_compared_with_the_plan(
    program: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program("small_gpu")
    peaks, path = program("peaks"), tmp_path / "peaks.json"
    small = ["--model=tiny", "--device=cpu", "--frames=20", "--dtype=float32"]
    plans = [result["planned_gb"] for result in peaks.main([*small, f"--json={path}"])]
    assert [len(r["losses"]) for r in json.loads(path.read_text())["results"]] == [2] * 6
    assert min(plans) > 0 and len(set(plans)) == 6
    case = "float8, TTT alone, B 8"
    for measured_gb, is_wrong in ((plans[2] * 1.05, False), (plans[2] * 1.2, True)):
        monkeypatch.setattr(peaks, "peaks", lambda _, gb=measured_gb: {"peak_gb": gb})
        (found,) = peaks.main([*small, "--cases", case])
        assert ("wrong" in found) == is_wrong
    assert "FURTHER THAN 10% FROM THE PLAN" in capsys.readouterr().out


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """A folder with dialogues of random codes."""
    random = torch.Generator().manual_seed(0)
    for part, rows in (("train", 12), ("eval", 4)):
        # A model learns quickly that there are only these.
        text = torch.randint(3, 9, (rows, 24), generator=random, dtype=torch.int16)
        codes = torch.randint(8, (rows, 16, 24), generator=random, dtype=torch.uint8)
        answers = torch.full((rows, 1, 9), -1, dtype=torch.int32)
        tensors = {"text": text, "codes": codes, "answers": answers}
        save_file(tensors, tmp_path / f"{part}.safetensors")
    (tmp_path / "dataset.json").write_text("{}")
    return tmp_path


CURVES = ["--tiny", "--device=cpu", "--frames=24", "--base-steps=4", "--steps=3"]
CURVES += ["--seeds=1", "--base-lr=3e-3"]


def test_precisions_train_on_the_same_base_and_batches(
    program: Callable[..., Any], dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves, path = program("precision_curves"), dialogues / "curves.json"
    found = curves.main([*CURVES, f"--data={dialogues}", f"--json={path}"])
    assert found["wrong"] == []
    kept = json.loads(path.read_text())
    assert [run["precision"] for run in kept["runs"]] == ["bfloat16", "float8", "nf4"]
    assert [len(run["curves"]["audio"]) for run in kept["runs"]] == [3, 3, 3]
    for ends in kept["ends"].values():
        plain, *rounded = ends.values()
        # Untrained LoRA and TTT: the base itself.
        assert plain["apart"] == [0, 0]
        for each in rounded:
            assert 0 < abs(each["start"] - plain["start"]) < 0.1 > abs(each["apart"][0]) > 0
    base, first = kept["base"]["after"], kept["runs"][0]["before"]
    assert first == pytest.approx(base, abs=1e-6)
    assert "| audio | nf4 |" in capsys.readouterr().out


def test_a_curve_that_does_not_fall_is_named(program: Callable[..., Any], dialogues: Path) -> None:
    curves = program("precision_curves")
    words = [*CURVES, f"--data={dialogues}", "--precisions=bfloat16", "--lr=0", "--ttt-lr=0"]
    found = curves.main(words)
    assert found["wrong"] == [
        f"bfloat16, seed 0: the loss of the {kind} has not fallen" for kind in ("text", "audio")
    ]


def test_dialogues_that_were_never_finished_are_made_again(
    program: Callable[..., Any], dialogues: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, made = program("precision_curves"), []
    monkeypatch.setattr(curves, "build_dataset", lambda folder, *_, **__: made.append(folder))
    options = curves.parse([*CURVES, f"--data={dialogues}"])
    curves.require_data(options)
    assert made == []
    (dialogues / "dataset.json").unlink()
    curves.require_data(options)
    assert made == [dialogues]


def test_dialogues_that_are_too_short_are_one_message(
    program: Callable[..., Any], dialogues: Path
) -> None:
    with pytest.raises(SystemExit, match="12 dialogues of 24 frames; a batch needs 4 of 40"):
        program("precision_curves").main(["--tiny", "--device=cpu", f"--data={dialogues}"])
