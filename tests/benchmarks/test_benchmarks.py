"""The benchmarks run, and print no speed for what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.errors import UserError


@pytest.fixture
def benchmark(program: Callable[..., Any]) -> ModuleType:
    return program("ops")


SMALL = ["--device=cpu", "--dtype=float32", "--width=8", "--hidden=12", "--chunk-size=4"]
SMALL += ["--sizes=2x23", "--windows=7"]


def test_operators_are_checked_and_timed(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ops.json"
    benchmark.main([*SMALL, "--repeats", "1", "--warmup", "0", "--json", str(path)])
    page = json.loads(path.read_text())
    assert (page["machine"], page["device"]) == ("CPU", "cpu")
    results = page["results"]
    assert [r["method"] for r in results] == [
        "projection",
        "sum",
        "delta",
        "sum, bf16 weights",
        "sum, fp32 weights",
        "linear, plain scan",
        "linear",
        "linear, groups of 16",
        "mlp, plain scan",
        "mlp",
        "mlp, groups of 16",
        "attention",
        "window 7",
        "masked 7",
    ]
    for result in results:
        # Weights in bfloat16 are not float32's equal.
        assert ("forward_backward_ratio" in result) == ("bf16" not in result["method"])
    assert "differs from the reference" in capsys.readouterr().out


def test_a_wrong_operator_gets_no_time(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        benchmark.ops, "in_place_ttt", lambda z, v, **_: torch.zeros_like(v) + 0 * v * z.sum()
    )
    found = benchmark.main([*SMALL, "--repeats", "1", "--methods", "sum"])
    assert [result["method"] for result in found] == ["projection", "sum"]
    assert "wrong" in found[1] and "forward_ms" not in found[1]


def test_what_an_operators_time_goes_into_is_listed(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--repeats", "1", "--methods", "delta", "--profile", "delta"]
    projection, delta = benchmark.main([*SMALL, *options])
    assert "profile" not in projection
    names = [row["name"] for row in delta["profile"]]
    assert "aten::linalg_cholesky_ex" in names
    times = [row["ms"] for row in delta["profile"]]
    assert times == sorted(times, reverse=True) and times[0] > 0
    assert f" calls  {names[0]}" in capsys.readouterr().out


def test_a_wrong_window_gets_no_time(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = benchmark.causal_attention
    monkeypatch.setattr(
        benchmark, "causal_attention", lambda q, k, v, window: right(q, k, v, window + 1)
    )
    found = benchmark.main([*SMALL, "--repeats", "1", "--methods", "window 7"])
    assert [result["method"] for result in found] == ["attention", "window 7"]
    assert "forward_ms" in found[0] and "wrong" in found[1]


STEP = ["--model=tiny", "--device=cpu", "--dtype=float32", "--batch=2", "--frames=20", "--rank=4"]
STEP += ["--warmup=1", "--steps=1"]


def test_training_steps_are_compared_and_timed(program: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "train_step.json"
    program("train_step").main([*STEP, "--selective-layers=1", "--json", str(path)])
    results = {r["name"]: r for r in json.loads(path.read_text())["results"]}
    assert list(results) == [
        "stock",
        "ours",
        "ours, float8",
        "ours, float8, selective",
        "ours, float8, in_place delta",
        "ours, nf4",
        "ours, nf4, selective",
        "ours, nf4, in_place delta",
        "ours, in_place sum",
        "ours, in_place delta",
        "ours, in_place hidden",
        "ours, linear",
        "ours, mlp",
        "ours, selective",
        "ours, selective in 1",
        "ours, in_place hidden, selective in 1",
        "ours, mlp, selective in 1",
        "ours, eager",
        "stock, full",
        "ours, full",
    ]
    for name, result in results.items():
        # e4m3 makes more of a difference in the last digit.
        bound = 1e-2 if "float8" in name else 1e-5
        assert result["loss_difference"] < bound and result["speedup"] > 0, name
        assert 0 < result["mfu"] < 1 and result["tokens_per_sec"] > 0
    assert results["ours"]["losses"][1] != results["ours"]["losses"][0]


def test_a_training_step_with_other_losses_gets_no_time(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = program("train_step")
    step = train_step.OurRun.step
    monkeypatch.setattr(train_step.OurRun, "step", lambda *args: step(*args) + 1e-4)
    found = train_step.main([*STEP, "--arms", "stock", "ours"])
    assert "step_sec" in found[0] and "step_sec" not in found[1] and "mfu" not in found[1]
    assert "losses differ from the stock model's by 1.0e-04" in capsys.readouterr().out
    assert train_step.exit_status(found) == 1


@pytest.mark.parametrize("wrong", ["OurRun", "StockRun"])
def test_a_training_step_whose_later_losses_are_no_numbers_gets_no_time(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    train_step = program("train_step")
    run = getattr(train_step, wrong)
    step = run.step
    losses: list[float] = []

    def failing(*args: Any) -> float:
        losses.append(step(*args) if not losses else float("nan"))
        return losses[-1]

    monkeypatch.setattr(run, "step", failing)
    found = train_step.main([*STEP, "--arms", "stock", "ours"])
    assert "wrong" in found[1] and not {"step_sec", "speedup"} & found[1].keys()
    assert train_step.exit_status(found) == 1


def test_the_stock_model_runs_with_every_choice_of_arms(
    program: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = program("train_step")
    found = train_step.main([*STEP, "--arms", "ours"])
    assert [r["name"] for r in found] == ["stock", "ours"] and found[1]["speedup"] > 0
    assert train_step.exit_status(found) == 0
    options = train_step.parse([*STEP, "--arms", "ours, full"])
    assert [arm.name for arm in train_step.chosen_arms(options)] == ["stock, full", "ours, full"]
    for option in ("--arms", "--profile"):
        with pytest.raises(SystemExit) as stopped:
            train_step.parse([*STEP, option, "nosuch"])
        assert stopped.value.code == 2
        assert f"{option}: there is no 'nosuch'" in capsys.readouterr().err


def test_the_kernels_of_a_step_are_listed_in_a_new_folder(
    program: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "profiles"
    chosen = ["--arms", "ours", "--profile", "ours", "--profile-dir", str(folder)]
    program("train_step").main([*STEP, *chosen])
    (listed,) = folder.iterdir()
    assert listed.name == "profile_ours.txt" and "aten::mm" in listed.read_text()


def test_only_a_search_may_run_out_of_memory(program: Callable[..., Any]) -> None:
    status = program("train_step").exit_status
    assert status([{"wrong": "out of memory"}]) == 1
    assert status([{"wrong": "out of memory", "is_search": True}]) == 0
    assert status([{"wrong": "losses are not finite", "is_search": True}]) == 1


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "lora"])
def test_operations_of_a_step_are_counted(program: Callable[..., Any], is_full: bool) -> None:
    """Against PyTorch's own counter, which counts all pairs of frames in attention."""
    train_step = program("train_step")
    options = train_step.parse([*STEP, "--frames=20"])
    arm = train_step.Arm("ours", is_full=is_full, checkpointing=False, compile=False)
    model = train_step.Weights(options).ours(arm)
    run = train_step.OurRun(model, options)
    with FlopCounterMode(display=False) as counter:
        run.step(train_step.random_codes(2, arm, options))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    window = 20 * 21 / 2 / 20
    attention = 12 * 2 * 20 * window * train_step.lm_kwargs(arm, options)["dim"] * 3
    counted = train_step.operations(model, arm, 2, options)
    # The first layer's input needs a gradient here, as the embeddings train.
    assert counted - attention == pytest.approx(products, rel=0.02)


# Numbers fall into other steps of e4m3: what that does to a loss is small in a mean of many.
FLOAT8 = ["--base-precision=float8", "--frames=500"]
LOSSES = ["--model=tiny", "--device=cpu", "--batch=2", "--frames=60", "--rank=4", "--lr=1e-3"]


@pytest.mark.parametrize(
    "dtype, kind",
    [
        ("float32", []),
        pytest.param("bfloat16", [], marks=pytest.mark.slow),
        pytest.param("bfloat16", ["--full"], marks=pytest.mark.slow),
        pytest.param("float32", ["--base-precision=nf4"], marks=pytest.mark.slow),
        pytest.param("bfloat16", FLOAT8, marks=pytest.mark.slow),
    ],
)
def test_losses_stay_within_the_bound_and_errors_do_not(
    program: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: str,
    kind: Any,
) -> None:
    same_losses, path = program("same_losses"), tmp_path / "losses.json"
    all_runs = same_losses.runs
    monkeypatch.setattr(
        same_losses, "runs", lambda options: [r for r in all_runs(options) if not r.arm.compile]
    )
    num_steps = 5 if dtype == "float32" and not kind else 8
    options = [*LOSSES, *kind, "--dtype", dtype, "--planted", f"--steps={num_steps}"]
    options += ["--json", str(path)]
    found = same_losses.main(options)
    assert same_losses.exit_status(found) == 0, found
    results = {r["name"]: r for r in json.loads(path.read_text())["results"]}
    num_planted = 1 if kind == ["--full"] else 4 if kind else 2
    num_stock = 5 if kind and kind != ["--full"] else 3
    assert len(results) == num_stock + 3 + num_planted + ("ours, eager, sums in 32 bits" in results)
    assert ("ours, eager, sums in 32 bits" in results) == (kind == FLOAT8)
    for name, result in results.items():
        losses = result["losses"]
        assert losses[-1] < losses[0] - 0.01
        if name.startswith("planted"):
            assert result["share_of_bound"] > 2
        elif name.startswith("ours"):
            assert len(result["bounds"]) == num_steps and max(result["bounds"]) < 0.1
        if kind == FLOAT8 and name.startswith(("planted: scales", "planted: a block")):
            assert result["target_share_of_bound"] > 2
        assert ("target_distance" in result) == (kind == FLOAT8)


MANY = ["--model=tiny", "--device=cpu", "--gpus=2", "--batch=2", "--frames=40", "--rank=2"]
MANY += ["--loss-steps=2", "--warmup=0", "--steps=1"]


@pytest.mark.slow
def test_several_gpus_are_compared_with_one(program: Callable[..., Any], tmp_path: Path) -> None:
    program("many_gpus_arms")
    path = tmp_path / "many.json"
    program("many_gpus").main([*MANY, f"--json={path}", f"--log-dir={tmp_path}"])
    results = json.loads(path.read_text())["results"]
    assert len(results) == 9 and not any("wrong" in result for result in results)
    for result in results:
        if result["gpus"] == 2:
            assert result["loss_difference"] < 1e-5, result["name"]


@pytest.fixture
def many_gpus(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    """With processes that only write what a test says, for each start in turn."""
    program("many_gpus_arms")
    many_gpus = program("many_gpus")

    def run(*scripts: Any, arms: Any) -> tuple[dict[str, Any], list[Any]]:
        started: list[Any] = []

        def start(
            names: Any, on_all: Any, results_file: Any, log: Any, options: Any
        ) -> subprocess.Popen[bytes]:
            code = f"import json, os, sys, time; names = {names!r}\n{scripts[len(started)]}"
            started.append(names)
            write = (
                "def write(name, loss=5.0, **more):\n"
                f"    with open({str(results_file)!r}, 'a') as file:\n"
                "        line = dict(name=name, gpus=1, batch=2, losses=[loss], step_sec=1.0)\n"
                "        line |= dict(tokens_per_sec=9.0, plan_gb=1.0) | more\n"
                "        file.write(json.dumps(line) + '\\n')\n"
            )
            return subprocess.Popen([sys.executable, "-c", write + code], start_new_session=True)

        monkeypatch.setattr(many_gpus, "start", start)
        found = many_gpus.main([*MANY, "--limit=3", f"--log-dir={tmp_path}", "--arms", *arms])
        return {result["name"]: result for result in found}, started

    return run


ALL_GOOD = "[write(name) for name in names]"


def test_another_loss_on_several_gpus_gets_no_time(many_gpus: Callable[..., Any]) -> None:
    found, _ = many_gpus(
        ALL_GOOD,
        "write('replicas', 5.01); write('sharded', tokens_per_sec=17.0)",
        arms=["replicas", "sharded"],
    )
    assert "step_sec" not in found["replicas"] and "1.0e-02" in found["replicas"]["wrong"]
    assert found["sharded"]["speedup"] == pytest.approx(17 / 9)


@pytest.mark.parametrize(
    "end",
    ["os._exit(1)", "write('sharded', wrong='no memory'); os._exit(1)", "time.sleep(60)"],
    ids=["fails", "says why", "hangs"],
)
def test_a_line_that_fails_does_not_stop_the_others(
    many_gpus: Callable[..., Any], end: str
) -> None:
    found, started = many_gpus(
        ALL_GOOD,
        f"write('replicas'); {end}",
        ALL_GOOD,
        arms=["replicas", "sharded", "sharded, full"],
    )
    assert started[1:] == [["replicas", "sharded", "sharded, full"], ["sharded, full"]]
    assert [name for name, result in found.items() if "wrong" in result] == ["sharded"]


def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(
    program: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path, tmp_path / "file/results.json"):
        with pytest.raises(SystemExit):
            program("ops").parse(["--json", str(path)])
        assert str(path) in capsys.readouterr().err
    made = tmp_path / "new/results.json"
    assert program("ops").parse(["--json", str(made)]).json == made
    assert made.parent.is_dir() and not made.exists()
    made.write_text("numbers of another machine")
    with pytest.raises(SystemExit):
        program("ops").parse(["--json", str(made)])
    assert f"{made} is there already" in capsys.readouterr().err


def test_pairs_of_speech_and_noise_replace_nothing(
    program: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogues = Path(__file__).parents[2] / "example/demo/dialogues/train.jsonl"
    out = tmp_path / "pairs"
    monkeypatch.setattr(sys, "argv", ["", str(dialogues), str(out), "--num_pairs=1"])
    made = program("noise_pairs")
    monkeypatch.setattr(made, "UTTERANCE_SEC", (0.2, 5.0))  # the dialogues are short
    monkeypatch.setattr(made, "MAX_PAUSE_SEC", 0.1)
    made.main()
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all((out / pair[kind]).is_file() for pair in pairs for kind in ("good", "bad"))
    kept = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="is there already; name a folder that is new or empty"):
        made.main()
    assert {path: path.read_bytes() for path in out.iterdir()} == kept
