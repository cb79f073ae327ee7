"""What a run says and logs about itself: at its start, and of TTT that does nothing or too much."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tools import some_words, write_jsonl, write_recording
from helpers import tiny_lm_kwargs
from training_tools import logged, train, trainer

from finetune.config import OptimArgs, TrainArgs, load_config
from finetune.config.args import DataArgs
from finetune.monitoring import EffectWatch, metrics_path, read_metrics
from finetune.plan import plan
from finetune.plan.describe import warn_of_slow_layers
from finetune.recall.experiment import train_arm
from finetune.recall.presets import preset
from ttt import TTTArgs, build_model


@pytest.mark.parametrize("learning_rate, warnings", [(1e-3, 1), (1.0, 0)])
def test_ttt_without_effect_is_warned_of_once(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    learning_rate: float,
    warnings: int,
) -> None:
    published = {"ttt.lr_scale": "none", "ttt.target": "text", "ttt.learning_rate": learning_rate}
    train(config, tmp_path, {"max_steps": 24, **published})
    out = capsys.readouterr().out
    assert out.count("it does nothing. Set ttt.lr_scale: relative, or raise ttt.l") == warnings
    assert out.count("steps TTT changes the outputs of layers 00, 01 by ") == warnings
    assert out.count("after 5 steps TTT changes its layers' outputs by ") == 1


@pytest.mark.parametrize(("batch_size", "is_said"), [(2, False), (7, False), (8, True)])
def test_a_step_of_more_segments_than_there_are_is_warned_of(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch_size: int,
    is_said: bool,
) -> None:
    overrides = {"max_steps": 1, "batch_size": batch_size, "do_ckpt": False}
    train(config, tmp_path / "run", overrides)
    warning = (
        "a step takes 8 segments, and the training data have 7: some come more than once in it, "
        "and the run is 1.1 epochs. Lower batch_size or num_microbatches, or train on more."
    )
    assert (warning in capsys.readouterr().out) == is_said
    kept = json.loads((tmp_path / "run/summary.json").read_text())["cautions"]
    assert (warning in kept) == is_said
    args = load_config(config, overrides)
    planned = list(plan(args, num_gpus=1, gpu_memory_gb=80))
    assert (f"warning: {warning}" in planned) == is_said
    doubled = list(plan(args, num_gpus=4, gpu_memory_gb=80))
    assert any("warning: a step takes" in line for line in doubled)


@pytest.mark.parametrize(
    ("early", "late", "warning"),
    [
        ({"05": 0.0, "11": 0.0}, {"05": 0.3, "11": 0.02}, ""),
        ({"05": 0.0, "11": 0.0}, {"05": 0.3, "11": 0.002}, "of layer 11 by 0.002 (11) of their"),
        # It did something at first, and does nothing any more.
        ({"05": 0.1, "11": 0.1}, {"05": 1e-3, "11": 1e-3}, "of layers 05, 11 by 0.001 (05), 0.0"),
        (
            {"05": 0.1, "11": 0.1},
            {"05": math.nan, "11": 0.1},
            "TTT adds nan (05) times the output of layer 05",
        ),
    ],
)
def test_effects_are_judged_by_layer_and_as_they_are_now(
    caplog: pytest.LogCaptureFixture, early: dict[str, float], late: dict[str, float], warning: Any
) -> None:
    watch = EffectWatch(TrainArgs(DataArgs(), "run", max_steps=400, optim=OptimArgs(pct_start=0.2)))
    caplog.set_level("WARNING")
    for step in range(1, 100):
        effects = early if step < 80 else late
        watch.look(step, {f"layer_{layer}/effect": value for layer, value in effects.items()})
        assert step >= 80 or not caplog.messages  # the rates rise for 80 steps
    assert len(caplog.messages) == bool(warning) and warning in "".join(caplog.messages)


@pytest.mark.parametrize(
    "losses, warning",
    [
        ([(43, 29), *[(92, 70)] * 6], ""),  # it learns
        ([(43, 29), *[(223, 213)] * 4, (556, 539)], "layer 05 has grown from 43 to 556 (05), and"),
        ([(43, 29), *[(223, 213)] * 3, (163, 152), *[(223, 213)] * 3], ""),  # not for long
        ([(43, 29), *[(556, 400)] * 6], ""),  # values grew, and updates follow them
        ([(43, 42.5), *[(44, 43.5)] * 6], ""),  # a small step by choice
    ],
)
def test_updates_that_no_longer_lower_the_inner_loss_are_warned_of_once(
    caplog: pytest.LogCaptureFixture, losses: list[tuple[float, float]], warning: str
) -> None:
    args = TrainArgs(DataArgs(), "run", max_steps=160, optim=OptimArgs(ttt_lr=6e-3))
    watch = EffectWatch(args)
    caplog.set_level("WARNING")
    for step, (before, after) in enumerate([*losses, losses[-1]]):
        names = {"effect": 1.0, "inner_loss_before": before, "inner_loss_after": after}
        watch.look(10 * step, {f"layer_05/{name}": value for name, value in names.items()})
        resumed = EffectWatch(args)
        resumed.load_state_dict(watch.state_dict())
        watch = resumed
    assert len(caplog.messages) == bool(warning) and warning in "".join(caplog.messages)
    assert not warning or "a lower optim.ttt_lr (now 0.006)" in caplog.messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("ttt_lr, warnings", [(6e-2, 1), (6e-3, 0)])
def test_a_learning_rate_that_is_too_high_for_ttt_linear_is_seen(
    ttt_lr: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    small = dataclasses.replace(preset("cpu"), mixer_lr=ttt_lr, num_steps=100)
    _, curve, _ = train_arm(small, "linear", seed=0, device=torch.device("cpu"))
    watch = EffectWatch(TrainArgs(DataArgs(), "run", max_steps=small.num_steps))
    caplog.set_level("WARNING")
    for record in curve:
        watch.look(int(record["step"]), record)
    grown = [message for message in caplog.messages if "the inner loss of layers 00, 01" in message]
    assert len(grown) == warnings


@pytest.mark.parametrize("learning_rate, warnings", [(1e6, 1), (1.0, 0)])
def test_ttt_that_drowns_its_layers_is_warned_of_once(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    learning_rate: float,
    warnings: int,
) -> None:
    train(config, tmp_path, {"max_steps": 6, "ttt.learning_rate": learning_rate})
    out = capsys.readouterr().out
    assert out.count("and drowns it. With write: sum, what all chunks have in common") == warnings


def test_what_ttt_does_is_logged_by_layer(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "free")
    train(config, tmp_path / "bounded", {"ttt.max_delta_norm": 1e-6})
    for layer in ("00", "01"):
        effects = logged(tmp_path / "free", f"ttt/layer_{layer}/effect")
        assert effects[0] == 0 and effects[-1] > 0  # untrained TTT changes nothing
        deltas = {
            run: logged(tmp_path / run, f"ttt/layer_{layer}/delta")[-1]
            for run in ("free", "bounded")
        }
        assert 0 < deltas["bounded"] < deltas["free"]
        clip_rates = {
            run: logged(tmp_path / run, f"ttt/layer_{layer}/clip_rate")
            for run in ("free", "bounded")
        }
        assert clip_rates["free"][-1] == clip_rates["bounded"][0] == 0 < clip_rates["bounded"][-1]
    assert all(norm > 0 for norm in logged(tmp_path / "free", "grad_norm/ttt"))


def start_lines(
    config: Path, run_dir: Path, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> Any:
    """What a run prints before its first step."""
    train(config, run_dir, {"max_steps": 1, "do_ckpt": False, **overrides})
    return capsys.readouterr().out.split("step 1/1")[0]


def test_a_run_says_what_it_is_going_to_do(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = start_lines(config, tmp_path, {"do_eval": True, "health_sec": 0}, capsys)
    assert "7 segments of up to 25 frames" in out and "3 to evaluate" in out
    assert "TTT: in-place (sum, relative, learning rate 1) in layers 0, 1; up to 4 " in out
    assert "updates a sequence, every 5 frames (0.4 s), in 6 of 7 segments; attention" in out
    assert "attention sees 12 frames of 25" in out
    assert "(frozen)" in out and "ttt 578" in out
    assert f"writes to {tmp_path}" in out
    assert "warning: " not in out


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"duration_sec": 0.4}, "(5 frames), not longer than ttt.chunk_size (5 frames)"),
        ({"ttt.chunk_size": 50}, "TTT never learns anything. Raise the one or lower the other"),
        # The longest recording is of 2.5 s.
        (
            {"duration_sec": 4, "ttt.chunk_size": 40},
            "no segment is longer than ttt.chunk_size (40 frames), the longest has 32 (2.6 s)",
        ),
        (
            {"duration_sec": 4, "ttt.chunk_size": 28},
            "TTT never learns anything in 5 of 6 segments, 83% of what is drawn, as they are not ",
        ),
        ({"duration_sec": 0.96}, "attention sees the whole sequence (12 frames)"),
        (
            {"duration_sec": 4, "model.attention_context": 40},
            "attention sees the whole sequence (32 frames), so there is little for TTT to "
            "remember. Sequences should be longer than the window: train on longer recordings.",
        ),
    ],
)
def test_a_run_warns_where_ttt_can_have_nothing_to_do(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    expected: Any,
) -> None:
    out = start_lines(config, tmp_path, overrides, capsys)
    assert out.count("warning: ") == 1 and expected in out


def test_recordings_shorter_than_a_chunk_are_no_reason_to_change_a_rate(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding lies after their first chunk, and nothing else."""
    short = {"duration_sec": 4, "ttt.chunk_size": 40}
    train(config, tmp_path, {**short, "max_steps": 22, "do_ckpt": False})
    out = capsys.readouterr().out
    assert "0 updates a sequence, every 40 frames" in out
    assert "optim.ttt_lr" not in out and out.count("warning: ") == 1
    records = read_metrics(metrics_path(tmp_path, "train"))
    assert not [name for name in records[-1] if name.startswith("ttt/")]
    assert json.loads((tmp_path / "summary.json").read_text()).items() >= {
        ("train_segments", 6),
        ("train_segments_in_which_ttt_learns", 0),
    }


@pytest.mark.parametrize("method, size, warns", [("linear", 64, False), ("mlp", 64, True)])
def test_a_run_on_a_gpu_warns_where_no_kernel_scans(
    caplog: pytest.LogCaptureFixture, method: str, size: int, warns: bool
) -> None:
    ttt = TTTArgs(enabled=True, method=method, mini_batch_size=size, start_layer=0)
    model = build_model(tiny_lm_kwargs(dim=32), ttt, device="cpu", dtype=torch.float32)
    warn_of_slow_layers(model)
    assert ("16 or 32 frames" in caplog.text) == warns


def test_what_is_wrong_with_a_list_that_trains_and_evaluates_is_said_once(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [write_recording(tmp_path, f"{number}.wav", 2.0) for number in range(3)]
    (tmp_path / "0.json").unlink()
    words = {"alignments": some_words(2.0), "mood": "calm"}
    (tmp_path / "1.json").write_text(json.dumps(words))
    lists = {key: str(write_jsonl(tmp_path / f"{key}.jsonl", lines)) for key in ("one", "other")}
    for evaluated, times in (("one", 1), ("other", 2)):
        overrides = {
            "data.train_data": lists["one"],
            "data.eval_data": lists[evaluated],
            "data.on_error": "skip",
            "do_eval": True,
            "max_steps": 1,
        }
        trainer(config, tmp_path / f"run {evaluated}", overrides)
        said = capsys.readouterr().out
        assert said.count("0.json is missing") == said.count("[unused-keys]") == times
        for key in ("train", "eval"):
            assert f"data.{key}_data: skipped 1 recording because of data.on_error=skip" in said
