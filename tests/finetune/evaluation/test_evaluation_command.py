"""What the command `evaluate` and a training's evaluations say: mistakes above all."""

import math
from pathlib import Path
from typing import Any

import evaluation_tools
import pytest
import torch
from data_tools import write_dataset
from evaluation_tools import options
from training_tools import checkpoint, train, trainer

from finetune.cli import evaluate, run
from finetune.distributed import Watch
from finetune.errors import UserError
from finetune.evaluation import evaluate_checkpoint
from finetune.evaluation.tasks.health.options import ContinuationOptions
from finetune.kept import Records
from finetune.monitoring import metrics_path, read_metrics

# Fixtures: pytest finds them by their names in this module.
_pictures = evaluation_tools._pictures
trained = evaluation_tools.trained


def test_earlier_results_are_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, {"a": 1}).append({"b": "é"})
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"b": ')
    monkeypatch.setattr("pathlib.Path.write_text", None)
    assert list(Records(path, {"a": 1})) == [{"b": "é"}] and path.read_bytes() == kept


def test_training_logs_the_health_of_speech(trained: tuple[Path, Path]) -> None:
    for record in read_metrics(metrics_path(trained[0].parent.parent, "eval")):
        for name in ("entropy", "modal_share", "padding_share", "silence_share", "repeat_rate"):
            assert math.isfinite(record[f"health/{name}"])


def test_a_long_check_of_speech_is_not_taken_for_a_hanging_process(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[str] = []
    monkeypatch.setattr(Watch, "at", lambda self, step, phase: signs.append(phase))
    data = str(write_dataset(tmp_path / "eval", [4.0]))
    given: dict[str, Any] = {"do_eval": True, "data.eval_data": data, "max_steps": 1}
    train(config, tmp_path / "without", given | {"duration_sec": 4, "health_sec": 0})
    num_without = len(signs)
    signs.clear()
    train(config, tmp_path / "with", given | {"duration_sec": 4, "health_sec": 2})
    # Two evaluations, before and after the only step, of 2 s at 12.5 frames a second.
    assert len(signs) >= num_without + 2 * 25


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"duration_sec": 2.9}, "segments (duration_sec) of 3 s, and these are of 2.9 s"),
        ({"health_sec": 0.9}, "it takes at least 1 s, and these are 0.9 s"),
        ({"duration_sec": 2, "health_sec": 0}, None),
        ({"duration_sec": 2, "do_eval": False}, None),
        ({"duration_sec": 3, "health_sec": 1}, None),
    ],
)
def test_speech_that_cannot_be_checked_is_told_at_the_start(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    why: Any,
) -> None:
    given: dict[str, Any] = {"do_eval": True, "duration_sec": 4, "health_sec": 6, **overrides}
    run = trainer(config, tmp_path, given)
    said = capsys.readouterr().out
    assert ("health of speech is not checked" in said) == (why is not None) and (why or "") in said
    assert (run.speech_check is None) == (why is not None or not overrides.get("health_sec"))


def test_data_of_the_run_that_are_not_there_are_told_with_where_they_are_named(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config.parent)
    named = {"data.eval_data": "eval/all.jsonl", "max_steps": 1}
    train(config, tmp_path / "run", named)
    saved = checkpoint(tmp_path / "run", 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run(lambda: evaluate(checkpoint=str(saved), tasks="position")) == 1
    said = capsys.readouterr().err
    assert (
        f"--data was not given, and data.eval_data of {saved / 'args.yaml'}: eval/all.jsonl does "
        f"not exist. Correct the path. Relative paths start from the current folder, {elsewhere}. "
        "Name the recordings with --data"
    ) in said
    assert "--data:" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "nowhere"}, "there is no folder nowhere; correct the path."),
        (
            {"tasks": "positions"},
            "--tasks: expected position or pairs or health or spoken_recall, got 'positions'",
        ),
        ({"arms": "on,of"}, "--arms: expected on or off or reset or carried, got 'of'"),
        ({"tasks": "pairs"}, "pairs needs --pairs"),
        ({"tasks": "position", "pairs": "nope.jsonl"}, "--pairs: counts for the task pairs alone"),
        ({"tasks": "health", "baseline": "base"}, "--baseline: counts for the task position alone"),
        ({"wandb.offline": "true"}, "--wandb.offline: name the project too"),
        ({"wandb.offline": "yse"}, "--wandb.offline: expected true or false"),
        ({"checkpoint": ""}, "--checkpoint is missing"),
        ({"checkpoint": "", "chekpoint": "x"}, "unknown option: --chekpoint"),
        ({"pair_side": "left"}, "--pair_side: expected moshi or user"),
        ({"data": "none.jsonl"}, "none.jsonl does not exist"),
        ({"data": "EMPTY"}, "is empty"),
        ({"bin_sec": "wide"}, "--bin_sec: expected a number"),
        ({"device": "gpu"}, "--device: expected auto or cpu or cuda"),
        ({"limits": "3"}, "unknown option: --limits"),
    ],
)
def test_mistakes_are_named(
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, str],
    message: Any,
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    path, data = trained
    given = {"checkpoint": str(path), "data": str(data), "out": str(tmp_path / "out")} | arguments
    if not given["checkpoint"]:
        del given["checkpoint"]
    if given["data"] == "EMPTY":
        given["data"] = str(tmp_path / "empty.jsonl")
    assert run(lambda: evaluate(**given)) == 1
    assert message in capsys.readouterr().err


def test_the_command_says_what_came_out(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = trained
    given: dict[str, Any] = {
        "checkpoint": str(path),
        "data": str(data),
        "out": str(tmp_path / "out"),
    }
    given |= {"tasks": "position", "arms": "on,off", "bin_sec": "0.8", "limit": "2"}
    assert run(lambda: evaluate(**given)) == 0
    printed = capsys.readouterr().out
    assert "- TTT on, compared with off" in printed and "report.html" in printed
    assert "too few recordings to show any difference" in printed


def test_results_that_never_came_stand_in_nobodys_way(tmp_path: Path) -> None:
    """An evaluation that ran out of memory at once goes on with another batch size."""
    path = tmp_path / "health.jsonl"
    Records(path, {"batch_size": 4})
    Records(path, {"batch_size": 2}).append({"index": 0})
    assert [record["index"] for record in Records(path, {"batch_size": 2})] == [0]
    with pytest.raises(UserError, match="batch_size was 2, is 1"):
        Records(path, {"batch_size": 1})
    path.write_text('{"notes": "mine"}\n')
    with pytest.raises(UserError, match="it does not say which"):
        Records(path, {"batch_size": 1})


@pytest.mark.parametrize(
    ("where", "sizes", "ways"),
    [
        ("finetune.evaluation.streaming.Scorer.score", {}, ["batch_size (now 2)"]),
        ("finetune.evaluation.bench.load_for_inference", {"batch_size": 1}, []),
    ],
)
def test_memory_that_is_too_small_is_one_message(
    trained: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    sizes: Any,
    ways: Any,
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(where, too_large)
    assert run(lambda: evaluate_checkpoint(options(trained, tmp_path / "out", **sizes))) == 1
    message = capsys.readouterr().err
    assert "error: The GPU ran out of memory" in message
    expected = [f"a smaller --{way}" for way in [*ways, "block_frames (now 7)"]]
    assert f"Less memory takes: {'; '.join(expected)}; --device cpu" in message


def test_recordings_too_short_for_health_are_said_before_the_model_is_loaded(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came when the loss of all of them had been measured."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was being loaded")

    monkeypatch.setattr("finetune.evaluation.bench.load_for_inference", load)
    health = ContinuationOptions(num_continuations=2, prompt_sec=500, health_sec=1.0)
    given = options(trained, tmp_path / "out", tasks=("position", "health"), health=health)
    with pytest.raises(UserError, match=r"--prompt_sec: no recording is longer than 500 s, behind"):
        evaluate_checkpoint(given)
    assert not (tmp_path / "out").exists()
