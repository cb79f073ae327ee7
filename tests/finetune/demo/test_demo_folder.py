"""The demonstration's folder: an earlier demonstration is replaced, and nothing else."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.checkpoint.run_record import RunRecord
from finetune.config import TrainArgs, load_config, save_config
from finetune.demo import run, run_demo
from finetune.errors import UserError

ROOT = Path(__file__).parents[3]
DIALOGUES = ROOT / "example/demo/dialogues"
SHORT = {
    "data.train_data": str(DIALOGUES / "train.jsonl"),
    "data.eval_data": str(DIALOGUES / "eval.jsonl"),
    "duration_sec": 4,
    "ttt.chunk_size": 10,
}


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def _in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown, and no data are made."""

    def stops(*_: Any) -> None:
        raise Stopped

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "make_dialogues", lambda folder: None)
    monkeypatch.setattr(run, "show_memory", stops)


def demonstrate(run_dir: Path, **overrides: Any) -> None:
    """The demonstration, until its run has begun."""
    codes = {"data.cache_dir": str(run_dir.parent / "codes")}
    with pytest.raises(Stopped):
        run_demo(run_dir, SHORT | codes | overrides)
    gc.collect()  # the lock is let go


def leave_checkpoint(run_dir: Path) -> Path:
    """As if the run had come so far that something would be lost."""
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/model").touch()
    RunRecord(run_dir).add(["checkpoints/model"])
    return run_dir / "checkpoints/model"


def trained_by_hand(run_dir: Path, **options: Any) -> Path:
    """A run of the demonstration's configuration, as its last words tell users to train."""
    run_dir.mkdir(exist_ok=True)
    args: TrainArgs = load_config("example/demo.yaml", {"run_dir": run_dir, **SHORT, **options})
    save_config(args, run_dir / "args.yaml")
    if not RunRecord(run_dir).exists():
        RunRecord(run_dir).create()
        RunRecord(run_dir).add(["args.yaml"])
        return leave_checkpoint(run_dir)
    return run_dir / "checkpoints/model"


def test_an_earlier_demonstration_is_replaced_with_all_that_it_left(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    demonstrate(run_dir)
    checkpoint = leave_checkpoint(run_dir)
    for name in run.OWN_FILES:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).touch()
    demonstrate(run_dir)
    assert not checkpoint.exists() and not (run_dir / run.OWN_FILES[0]).exists()


@pytest.mark.parametrize("is_continued", [False, True])
def test_a_run_that_somebody_trained_is_not_replaced(tmp_path: Path, is_continued: bool) -> None:
    run_dir = tmp_path / "run"
    if is_continued:
        demonstrate(run_dir)
        leave_checkpoint(run_dir)
    checkpoint = trained_by_hand(run_dir, resume=is_continued)
    with pytest.raises(UserError, match=r"already holds a run.*--overwrite_run_dir"):
        run_demo(run_dir, SHORT)
    assert checkpoint.exists()


def test_a_run_that_waits_behind_a_demonstration_is_not_replaced(tmp_path: Path) -> None:
    """A demonstration that was told to replace a run, and was killed, has earned nothing."""
    run_dir = tmp_path / "run"
    checkpoint = trained_by_hand(run_dir)
    demonstrate(run_dir, overwrite_run_dir=True)
    assert not checkpoint.exists()
    with pytest.raises(UserError, match="already holds a run"):
        run_demo(run_dir, SHORT)
    assert checkpoint.exists()


def test_the_folder_has_one_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given by --out"):
        run_demo(tmp_path / "run", {"run_dir": str(tmp_path / "other")})


def test_it_tells_what_it_does_and_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = SimpleNamespace(share=lambda arm: {"on": 0.9, "off": 0.05}[arm], num_values=12)
    monkeypatch.setattr(run, "show_memory", lambda folder, device: memory)
    monkeypatch.setattr(run, "PROMPT_SEC", 2.0)  # these dialogues last 5 s
    run_dir = tmp_path / "run"
    steps = {"max_steps": 2, "eval_freq": 1, "data.cache_dir": str(tmp_path / "codes")}
    run_demo(run_dir, SHORT | steps)
    said = capsys.readouterr().out
    told = [
        "[1/5] making dialogues in ",
        "[2/5] memory: example/memory",
        "[3/5] training another small Moshi",
        "step 2/2",
        "[4/5] drawing the loss curve",
        "[5/5] continuing a dialogue that it has not heard",
        "Done in ",
        "With TTT it answered 90% of the questions rightly, without TTT 5%; a guess is right in 8%",
        "learned from nothing, with TTT in layers ",
        "On dialogues it has not heard, its loss fell from ",
        "Then it took over Moshi's part in eval_000.wav after 2 s (|):\n  ",
        f"\n  {run_dir / 'loss.png'}   the loss curve",
        f"\n  {run_dir / 'continuation.wav'}   listen: left Moshi, right the user",
        f"\n  {run_dir / 'checkpoints/checkpoint_000002'}   the weights",
        "Next: change something in example/demo.yaml and train it again,",
    ]
    places = [said.find(each) for each in told]
    assert -1 not in places and places == sorted(places), said
    for name in ("loss.png", "continuation.wav", "continuation.txt"):
        assert (run_dir / name).stat().st_size > 0
    assert (run_dir / "continuation.txt").read_text().strip() in said
