"""The recall experiment: its models, its measures, and the command from end to end."""

import csv
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_args, tiny_relative_args

import finetune.recall.command as command
from finetune.cli import recall, run
from finetune.errors import UserError
from finetune.recall.arms import ARMS
from finetune.recall.command import run_recall
from finetune.recall.experiment import run_arm
from finetune.recall.jobs import Job, run_jobs
from finetune.recall.measure import Answers, measure_length, nothing_written
from finetune.recall.model import ModelArgs, answer_logits, new_model, read_codes
from finetune.recall.presets import Preset, preset
from finetune.recall.streams import StreamArgs, draw
from ttt import TTTArgs, TTTLMModel

MODEL = ModelArgs(width=16, num_layers=2, num_heads=2, context=4, depformer_width=8)
STREAMS = StreamArgs(
    num_frames=64, num_pairs=3, num_keys=8, num_values=4, num_fillers=4, num_codebooks=4,
    reach_frames=MODEL.reach_frames,
)  # fmt: skip


def tiny_preset(**changes: Any) -> Preset:
    options: dict[str, Any] = {
        "arms": ("off", "sum", "linear"), "ttt": {"start_layer": 0, "layer_frequency": 1},
        "chunk_size": 8, "mini_batch_size": 8, "num_steps": 3, "batch_size": 2, "num_eval": 4,
        "lengths": {2: 1},
    }  # fmt: skip
    return Preset(STREAMS, MODEL, **{**options, **changes})


def build(
    args: TTTArgs, *, context: int | None = None, streams: StreamArgs = STREAMS
) -> TTTLMModel:
    model = new_model(
        MODEL, streams, args, context=context, seed=0, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    return model.eval()


def codes_of(streams: Any) -> Any:
    return streams.codes


@pytest.mark.parametrize("variant", ["text", "audio"])
def test_answers_are_what_the_whole_model_says(variant: str) -> None:
    """Reading the answers alone gives the logits of `LMModel.forward` there."""
    args = StreamArgs(**{**STREAMS.__dict__, "variant": variant})
    model = build(TTTArgs(), streams=args)
    streams = draw(args, batch=2, seed=0)
    with torch.no_grad():
        whole = model(streams.codes)
        ours = answer_logits(
            model, read_codes(model, streams.codes), streams.answers, args.asked_stream
        )
    logits = whole.text_logits[:, 0] if variant == "text" else whole.logits[:, 0]
    expected = logits.gather(1, streams.answers[:, :, None].expand(-1, -1, logits.shape[2]))
    torch.testing.assert_close(ours, expected)


def test_attention_reaches_as_far_as_is_said_and_no_farther() -> None:
    model = build(TTTArgs())
    codes = draw(STREAMS, batch=1, seed=1).codes
    with torch.no_grad():
        before = model.forward_text(codes)[1][0, 0]
        codes[:, 0, 0] += 1
        changed = (model.forward_text(codes)[1][0, 0] - before).abs().amax(1) > 1e-6
    assert changed.nonzero().max() == MODEL.reach_frames == 6


def test_all_arms_start_from_the_same_weights() -> None:
    models = {name: build(preset("cpu").ttt_args(name)) for name in ("off", "delta", "mlp")}
    own = models["off"].state_dict()
    for model in models.values():
        state = model.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in own.items())
    assert set(preset("cpu").arms) < set(ARMS) and preset("gpu").arms == tuple(ARMS)
    assert preset("gpu").streams.num_frames >= 8 * preset("gpu").model.context


@pytest.mark.parametrize(
    "args", [tiny_relative_args(), tiny_relative_args(write="delta"), tiny_args()]
)
def test_with_nothing_written_it_is_the_model_without_ttt(args: TTTArgs) -> None:
    model, plain = build(args), build(TTTArgs())
    for module in model.ttt_layers.values():
        torch.nn.init.normal_(module.target_conv)
        if module.target_gate is not None:
            module.target_gate.data.fill_(1.0)
    plain.load_state_dict(model.state_dict(), strict=False)
    codes = draw(STREAMS, batch=2, seed=2).codes
    convs = {index: m.target_conv.clone() for index, m in model.ttt_layers.items()}
    with torch.no_grad():
        expected = plain.forward_text(codes)[1]
        assert (model.forward_text(codes)[1] - expected).abs().max() > 1e-3
        with nothing_written(model):
            torch.testing.assert_close(model.forward_text(codes)[1], expected)
    assert all(torch.equal(m.target_conv, convs[i]) for i, m in model.ttt_layers.items())


def test_a_long_stream_in_pieces_answers_as_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces are longer than the window, and the length is no multiple of them."""
    monkeypatch.setattr("finetune.recall.measure.PIECE_FRAMES", 10)
    args = tiny_relative_args(write="delta", start_layer=0, layer_frequency=1)
    model = build(args, context=7)
    for module in model.ttt_layers.values():
        module.target_gate.data.fill_(0.1)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "finetune.recall.measure.answer",
        lambda logits, streams, *rest: seen.update(logits=logits, streams=streams) or judge(*rest),
    )

    def judge(*_: Any) -> Answers:
        zeros = torch.zeros(seen["streams"].answers.shape)
        return Answers(zeros == 0, zeros, zeros, zeros != 0)

    found = measure_length(model, STREAMS, times=3, num_sequences=2, update_frames=5)
    with torch.no_grad():
        read = read_codes(model, seen["streams"].codes)
        expected = answer_logits(model, read, seen["streams"].answers, 0)
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-4, atol=1e-4)
    assert set(found) == {"old", "late", "rebound", "silence"}
    assert all(kind["state_ratio"] > 0 for kind in found.values())


def test_intervals_are_over_sequences() -> None:
    """All answers of a sequence right or wrong together: the interval is as wide as for 100
    answers, not for 1000."""
    is_right = (torch.arange(100) < 50)[:, None].expand(100, 10)
    found = Answers(is_right, (~is_right).float(), is_right, is_right)
    summary = found.summary(torch.ones_like(is_right))
    value, low, high = summary["accuracy"]
    assert value == 0.5 and 0.38 < low < 0.43 and 0.57 < high < 0.62 and summary["count"] == 1000
    assert summary["loss"][0] == 0.5
    assert found.summary(torch.zeros_like(is_right))["accuracy"] is None


def test_the_command_writes_a_table_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "preset", lambda size, variant: tiny_preset())
    arguments: dict[str, Any] = {
        "size": "cpu", "variant": "text", "arms": [], "seeds": [0], "num_steps": None,
        "lengths": None, "device": "cpu", "workers": 1,
    }  # fmt: skip
    report = run_recall(tmp_path, **arguments)
    assert report.count("| sum") >= 3 and "sum, nothing written" in report
    assert "inner loss" in report and "more than 6 frames later" in report
    assert (tmp_path / "recall.png").stat().st_size > 1000
    assert (tmp_path / "report.md").read_text() == report + "\n"
    with (tmp_path / "recall.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"off", "sum", "sum, nothing written", "linear"}
    assert {row["kind"] for row in rows} >= {"all", "straddling", "old", "late", "rebound"}
    (tmp_path / "runs/off_seed0.json").unlink()
    capsys.readouterr()
    assert run_recall(tmp_path, **arguments) == report
    said = capsys.readouterr().out
    assert "2 of 3 runs are in" in said and "off, seed 0: step" in said and "sum, seed" not in said
    kept = (tmp_path / "runs/off_seed0.json").read_bytes()
    with pytest.raises(UserError, match=r"of other options \(num_steps: \d+ there, 2 here\)"):
        run_recall(tmp_path, **{**arguments, "num_steps": 2, "arms": ["off"]})
    assert (tmp_path / "runs/off_seed0.json").read_bytes() == kept
    with pytest.raises(UserError, match="there is no delta_rule"):
        run_recall(tmp_path, **{**arguments, "arms": ["delta_rule"]})


@pytest.mark.parametrize("name", ["finetuned", "mlp", "full", "delta_input"])
def test_every_arm_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "preset", lambda size, variant: tiny_preset(arms=(name,)))
    report = run_recall(
        tmp_path, size="cpu", variant="audio", arms=[], seeds=[0], num_steps=2, lengths=[],
        device="cpu", workers=1,
    )  # fmt: skip
    result = json.loads((tmp_path / f"runs/{name}_seed0.json").read_text())
    assert f"| {name} |" in report and (result["base_curve"] != []) == (name == "finetuned")


def square(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"square": x * x}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_come_back_in_order(tmp_path: Path, workers: int) -> None:
    jobs = [Job(f"job{x}", {"x": x}, square, (x,)) for x in range(3)]
    assert [r["square"] for r in run_jobs(jobs, tmp_path, workers=workers)] == [0, 1, 4]
    (tmp_path / "job1.json").write_text("{")
    with pytest.raises(UserError, match=r"job1\.json is damaged.* move it away"):
        run_jobs(jobs, tmp_path, workers=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"variant": "video"},
            "--variant: expected text or audio or joint or segments or spoken, got 'video'",
        ),
        ({"preset": "tpu"}, "--preset: expected cpu or gpu"),
        ({"seeds": "0,x"}, "--seeds: expected a whole number"),
        ({"arms": "off,delta_rule"}, "--arms: there is no delta_rule"),
        ({"device": "gpu"}, "--device: expected auto or cpu or cuda"),
        ({"steps": "--5"}, "--steps: expected a whole number or null, got '--5'"),
        ({"steps": "²"}, "--steps: expected a whole number or null, got '²'"),
        ({"sizes": "3"}, "unknown option: --sizes"),
        ({"study": "scale"}, "unknown option: --study"),
        ({"seeds": ","}, "--seeds: expected at least one"),
        ({"arms": ","}, "--arms: expected at least one"),
        ({"arms": ""}, "--arms: expected at least one"),
        ({"lengths": ""}, "--lengths: expected at least one"),
        ({"lengths": "1"}, "--lengths: expected whole numbers of at least 2"),
        ({"lengths": "0,4"}, "--lengths: expected whole numbers of at least 2"),
    ],
)
def test_mistakes_are_explained(
    arguments: dict[str, str], message: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(lambda: recall(out=str(tmp_path), **arguments)) == 1
    assert message in capsys.readouterr().err
    # Nothing has been done here: another experiment may be.
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("blocked", ["", "runs"])
def test_a_folder_that_cannot_be_written_is_told_before_training(
    blocked: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(command, "run", never)
    place = tmp_path / "out"
    if blocked:
        place.mkdir()
    (place / blocked).write_text("a file, not a folder")
    assert run(lambda: recall(out=str(place))) == 1
    said = f"cannot write to {place / blocked}" if blocked else f"{place} is a file; name a folder"
    assert f"--out: {said}" in capsys.readouterr().err


def test_experiments_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: dict[Path, Any] = {}
    monkeypatch.setattr(command, "run_recall", lambda out, **given: places.update({out: given}))
    asked = [{}, {"variant": "audio"}, {"preset": "gpu"}, {"out": str(tmp_path)}]
    for options in asked:
        recall(**options)
    assert len(places) == len(asked) and tmp_path in places


def test_another_experiment_does_not_replace_what_is_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "preset", lambda size, variant: tiny_preset(arms=("off",)))
    options: dict[str, Any] = {"out": str(tmp_path), "arms": "off", "lengths": "0", "device": "cpu"}
    assert run(lambda: recall(**options)) == 0
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert tmp_path / "runs/off_seed0.json" in kept and tmp_path / "report.md" in kept
    for other in ({"variant": "audio"}, {"preset": "gpu"}):
        assert run(functools.partial(recall, **options, **other)) == 1
        message = capsys.readouterr().err
        assert f"--out: {tmp_path} has the results of another experiment" in message
        assert "--preset cpu --variant text" in message
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert run(lambda: recall(**options, seeds="0,1")) == 0
    assert (tmp_path / "runs/off_seed1.json").is_file()


def test_what_is_named_twice_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(command, "run_recall", lambda out, **options: found.update(options))
    recall(seeds="0,0,1", arms="off, off,sum", lengths="4,4")
    assert found["seeds"] == [0, 1] and found["arms"] == ["off", "sum"]
    assert found["lengths"] == [4]


def test_full_attention_is_not_measured_where_it_is_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "preset", lambda *_, **__: tiny_preset(arms=("full", "off")))
    options: dict[str, Any] = {"num_steps": 2, "lengths": None, "device": "cpu", "workers": 1}
    options |= {"size": "cpu", "variant": "text", "seeds": [0]}
    report = run_recall(tmp_path, arms=[], **options)
    assert "| full | 0." in report and "| full | 2 |" not in report
    assert "| off | 2 |" in report and "`full` is left out" in report
    assert "On longer" not in run_recall(tmp_path, arms=["full"], **options)


def test_a_report_on_segments_says_what_was_asked_and_what_chance_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = dataclasses.replace(STREAMS, variant="segments")
    segments = dataclasses.replace(tiny_preset(arms=("off",)), streams=streams)
    monkeypatch.setattr(command, "preset", lambda *_, **__: segments)
    report = run_recall(
        tmp_path, size="cpu", variant="segments", arms=[], seeds=[0], num_steps=2, lengths=[],
        device="cpu", workers=1,
    )  # fmt: skip
    assert "one segment of 6 frames" in report and "facts in" not in report
    assert "Chance is 0.12" in report  # one of 8 keys, and not of 4 values


def test_few_sequences_have_no_interval() -> None:
    is_right = torch.rand(8, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    found = Answers(is_right, (~is_right).float(), is_right, is_right)
    chosen = torch.ones_like(is_right)
    chosen[3:] = False
    _, low, high = found.summary(chosen)["accuracy"]
    _, low_of_all, high_of_all = found.summary(torch.ones_like(is_right))["accuracy"]
    assert 0 <= low <= low_of_all < high_of_all <= high <= 1
    chosen[2] = False
    value, low, high = found.summary(chosen)["accuracy"]
    assert 0 < value < 1 and low is None and high is None


def test_all_answers_right_in_a_few_sequences_are_no_proof() -> None:
    is_right = torch.ones(3, 10, dtype=torch.bool)
    found = Answers(is_right, (~is_right).float(), is_right, is_right)
    value, low, high = found.summary(is_right)["accuracy"]
    # Wilson's interval of 3 of 3.
    assert value == high == 1 and low == pytest.approx(0.4385, abs=1e-4)
    value, low, high = found.summary(is_right)["loss"]
    assert value == low == 0


@pytest.mark.slow
def test_what_is_out_of_sight_is_recalled_with_ttt_and_not_without() -> None:
    """The claim itself, at the size of `--preset cpu` with its own seed: a minute of one core."""
    small = dataclasses.replace(preset("cpu"), num_eval=32, lengths={})
    cpu = torch.device("cpu")
    ttt, windowed = (run_arm(small, name, 0, cpu) for name in ("delta", "off"))
    assert ttt["trained_length"]["all"]["accuracy"][0] >= 0.9
    assert ttt["nothing_written"]["all"]["accuracy"][0] <= 0.1
    assert windowed["trained_length"]["all"]["accuracy"][0] <= 0.1
