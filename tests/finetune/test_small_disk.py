"""What is known to find no room on the disk is said before the work is done."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recordings_tools import call
from training_tools import FULL, LORA, trainer

from finetune.checkpoint import CheckpointBytes, CheckpointWriter, checkpoint_bytes
from finetune.checkpoint.snapshot import SPARE_BYTES, Snapshot

ROOT = Path(__file__).parents[2]
DIALOGUES = ROOT / "example/demo/dialogues"
MODEL = ROOT / "example/memory"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The disk, whose `free` bytes a test sets."""
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return usage


@pytest.mark.parametrize(("words", "per_sample"), [((), 2), (("--stereo",), 4)])
def test_an_answer(
    tmp_path: Path,
    free: SimpleNamespace,
    words: tuple[str, ...],
    per_sample: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Others, for which there is room, are given."""
    (tmp_path / "in").mkdir()
    shutil.copy(DIALOGUES / "eval_000.wav", tmp_path / "in/long.wav")
    from soundfile import write

    write(tmp_path / "in/short.wav", [0.0] * 24000, 24000)
    free.free = per_sample * 5 * 24000 - 1
    out = tmp_path / "out"
    given = ("generate", MODEL, f"--audio={tmp_path / 'in'}", f"--out={out}", "--device=cpu")
    assert call(*given, *words) == 1
    said = capsys.readouterr().err
    assert f"- {out / 'long.wav'} takes {per_sample * 0.12:.2f} MB, and" in said
    assert sorted(path.name for path in out.iterdir()) == ["short.json", "short.wav"]


def test_talks_and_codes(
    tmp_path: Path, free: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "talks"
    assert call("recall-audio", out, "--num_talks=2") == 1
    assert f"{out} takes" in capsys.readouterr().err and not out.exists()
    data = [f"--data.{kind}_data={DIALOGUES / kind}.jsonl" for kind in ("train", "eval")]
    config, cache = ROOT / "example/demo.yaml", tmp_path / "codes"
    assert call("data", "encode", config, *data, f"--data.cache_dir={cache}") == 1
    assert f"{cache} takes 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    snapshots: list[Snapshot] = []
    prepare = CheckpointWriter._prepare

    def noted(self: CheckpointWriter, snapshot: Snapshot) -> str | None:
        snapshots.append(snapshot)
        return prepare(self, snapshot)

    monkeypatch.setattr(CheckpointWriter, "_prepare", noted)
    done = trainer(config, tmp_path / "run", {"max_steps": 1, **kind})
    known = checkpoint_bytes(done.args, done.model, done.world).written
    assert done.train() == 0
    assert snapshots[0].num_bytes == pytest.approx(known - SPARE_BYTES, rel=0.01)


@pytest.mark.parametrize(("missing_bytes", "is_warned"), [(1, True), (0, False)])
def test_a_checkpoint_is_warned_of(
    config: Path,
    tmp_path: Path,
    free: SimpleNamespace,
    missing_bytes: int,
    is_warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Somebody may clean up meanwhile."""
    import finetune.trainer

    free.free = 3_000_000_000
    size = CheckpointBytes(0.0, free.free + missing_bytes)
    monkeypatch.setattr(finetune.trainer, "checkpoint_bytes", lambda *_: size)
    trainer(config, tmp_path / "run", {"ckpt_freq": 7})
    said = "warning: run_dir: a checkpoint takes 3.00 GB, and 3.00 GB are free on the disk of"
    assert (said in capsys.readouterr().out) is is_warned


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 4),  # the last three, and one that is being written
        ({"do_eval": True}, 5),  # and the best
        ({"num_ckpt_keep": 1}, 2),
        ({"num_ckpt_keep": None}, 7),
        ({"ckpt_freq": 6}, 3),
        ({"ckpt_freq": 0}, 1),
        ({"num_ckpt_keep": None, "ckpt_freq": 5}, 3),
        ({"do_ckpt": False}, 0),
    ],
    ids=str,
)
def test_checkpoints_that_lie_there_at_once_are_warned_of(
    config: Path,
    tmp_path: Path,
    free: SimpleNamespace,
    changes: dict[str, Any],
    most: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As many as there are when it trains, on a disk that has room for all."""
    given = {"ckpt_freq": 2, "max_steps": 13, "num_ckpt_keep": 3, **changes}
    free.free = 10**12
    run = trainer(config, tmp_path / "run", given)
    assert "to lie there at once" not in capsys.readouterr().out
    size = checkpoint_bytes(run.args, run.model, run.world).written
    assert most == 0 or size > 0
    for num_free, is_warned in ((most, False), (most - 1, True)):
        free.free = int(max(0, num_free) * size) + 1
        trainer(config, tmp_path / "run", given)
        said = capsys.readouterr().out
        if most > 1:
            begins = f"warning: run_dir: {most} more checkpoints of {size / 1e9:.2f} GB are to lie"
            assert (begins in said) is is_warned
            assert (f"which is enough for {num_free}: free some" in said) is is_warned
        else:
            assert "to lie there at once" not in said


def test_checkpoints_that_are_there_are_not_counted_again(
    config: Path, tmp_path: Path, free: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    free.free = 10**12
    given = {"ckpt_freq": 1, "max_steps": 6, "num_ckpt_keep": 3}
    done = trainer(config, tmp_path / "run", given)
    size = checkpoint_bytes(done.args, done.model, done.world).written
    assert done.train() == 0
    longer = {"resume": True, "max_steps": 20}
    for num_kept, is_warned in ((3, False), (5, True)):
        free.free = int(size) + 1
        trainer(config, tmp_path / "run", {**given, **longer, "num_ckpt_keep": num_kept})
        said = capsys.readouterr().out
        assert ("run_dir: 3 more checkpoints" in said) is is_warned
        assert ("more checkpoints" in said) is is_warned
