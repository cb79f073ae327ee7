"""The sweeps in `example` and in the documentation: they load, and they run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.sweep.plan import load_sweep

ROOT = Path(__file__).parents[3]
DIALOGUES = ROOT / "example/demo/dialogues"
SHIPPED = [path for path in (ROOT / "example").glob("*.yaml") if "sweep_dir:" in path.read_text()]
ON_DIALOGUES: dict[str, Any] = {
    "data.train_data": str(DIALOGUES / "train.jsonl"),
    "data.eval_data": str(DIALOGUES / "eval.jsonl"),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_sweeps_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_sweep(path, ON_DIALOGUES)
    assert len(plan.runs) >= 4 and path.stem == plan.folder.name


def test_the_modern_stack_has_the_six_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_sweep(ROOT / "example/modern_stack.yaml", ON_DIALOGUES)
    old = ("layer_norm", "none", "sin")
    new = ("rms_norm_f32", "silu", "rope")
    found = {
        name: (run.args.model.norm, run.args.model.gating, run.args.model.positional_embedding)
        for name, run in plan.runs.items()
    }
    assert found == {
        "baseline": old,
        "modern_norm": (new[0], old[1], old[2]),
        "modern_ffn": (old[0], new[1], old[2]),
        "modern_positions": (old[0], old[1], new[2]),
        "partial_modern": (new[0], new[1], old[2]),
        "full_modern": new,
    }
    assert len({run.args.seed for run in plan.runs.values()}) == 1


def test_the_curriculum_grows_and_ends_as_its_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = load_sweep(ROOT / "example/curriculum.yaml", ON_DIALOGUES).runs
    stages = [runs[name].args for name in ("short", "middle", "long")]
    lengths = [stage.duration_sec for stage in stages]
    windows = [stage.model.attention_context or 0 for stage in stages]
    assert all(windows)
    assert lengths == sorted(lengths) and windows == sorted(windows, reverse=True)
    assert len({stage.duration_sec * stage.batch_size for stage in stages}) == 1
    direct = runs["direct"].args
    assert direct.max_steps == sum(stage.max_steps for stage in stages)
    assert (direct.duration_sec, direct.model) == (lengths[-1], stages[-1].model)


def test_the_documented_file_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    path = tmp_path / "documented.yaml"
    path.write_text("".join(blocks))
    plan = load_sweep(path, ON_DIALOGUES)
    assert plan.chains(plan.runs) == [["off"], ["chunk_10"], ["chunk_50", "longer"]]
    assert plan.runs["longer"].args.ttt.write == "delta" and plan.slurm["gres"] == "gpu:1"


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_sweeps_run(path: Path, tmp_path: Path) -> None:
    """Every run of them, a few steps, in processes of their own."""
    short: dict[str, Any] = {
        **ON_DIALOGUES,
        "max_steps": 3,
        "eval_freq": 0,
        "batch_size": 2,
        "log_freq": 1,
    }
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "sweep", str(path), f"--sweep_dir={tmp_path / 'out'}"]
        + [f"--{key}={value}" for key, value in short.items()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out/table.json").read_text())
    assert {row["status"] for row in rows} == {"finished"}
