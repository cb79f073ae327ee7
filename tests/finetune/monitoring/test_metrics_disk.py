"""A full disk leaves a run's metrics, and the name of its wandb run, as they were."""

import errno
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from full_disk import FULL, room_for
from test_metrics import files_in_order, scalars

from finetune.errors import UserError
from finetune.monitoring import MetricsLogger, read_metrics

__all__ = ["files_in_order"]  # a fixture, for all tests here

NO_WANDB = SimpleNamespace(project=None, offline=True, key=None, run_name=None)
WANDB = SimpleNamespace(project="p", offline=True, key=None, run_name=None)


def test_the_metrics_of_a_run_that_resumes(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}) as metrics:
        for step in range(1, 31):
            metrics.log("train", step, {"loss": step})
    before = sorted(tmp_path.glob("*metrics*"))
    with room_for(1000), pytest.raises(UserError, match=rf"metrics\.train\.jsonl .*{FULL}"):
        MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}, resumed_step=20)
    assert sorted(tmp_path.glob("*metrics*")) == before
    lines = read_metrics(tmp_path / "metrics.train.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 31)]


def test_lines_wait_for_room_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}) as metrics:
        with room_for(1000):
            for step in range(1, 31):
                metrics.log("train", step, {"loss": step})
        lines = read_metrics(tmp_path / "metrics.train.jsonl")
        assert 0 < len(lines) < 30 and (tmp_path / "metrics.train.jsonl").stat().st_size == 1000
        (warning,) = (r.getMessage() for r in caplog.records if "metrics.train" in r.getMessage())
        assert FULL in warning and "training goes on" in warning
        caplog.set_level("INFO")
        metrics.log("train", 31, {"loss": 31})
        lines = read_metrics(tmp_path / "metrics.train.jsonl")
        assert [line["loss"] for line in lines] == [*range(1, 32)]
        assert "there is room again, and no line is missing" in caplog.text
        # A second time is said as well.
        caplog.clear()
        with room_for(0):
            metrics.log("train", 32, {"loss": 32})
            assert "training goes on" in caplog.text


def test_a_run_that_ends_with_a_full_disk_says_so(tmp_path: Path) -> None:
    with room_for(1000), pytest.raises(UserError, match=rf"metrics\.train\.jsonl .*{FULL}"):  # noqa: SIM117
        with MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}) as metrics:
            for step in range(1, 31):
                metrics.log("train", step, {"loss": step})


@pytest.mark.parametrize("error", [UserError("the loss is NaN"), KeyboardInterrupt()])
def test_why_a_run_has_ended_is_not_hidden_by_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    with room_for(100), pytest.raises(type(error)) as ended:  # noqa: SIM117
        with MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}) as metrics:
            for step in range(1, 31):
                metrics.log("train", step, {"loss": step})
            raise error
    assert ended.value is error
    assert f"metrics.train.jsonl cannot be written: {FULL}" in caplog.text


def test_tensorboard_leaves_no_file_for_every_step_of_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, folder: str, **_: object) -> None:
            (Path(folder) / f"events.{time.monotonic_ns()}").touch()

        def add_scalar(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}) as metrics:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Full)
        monkeypatch.setattr(metrics._tensorboard, "_writer", Full(str(tmp_path / "tb")))
        before = len(list((tmp_path / "tb").iterdir()))
        with room_for(0):
            for step in range(1, 31):
                metrics.log("train", step, {"loss": step})
        assert len(list((tmp_path / "tb").iterdir())) == before


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_when_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.monitoring.metrics.TENSORBOARD_FLUSH_SEC", 0)
    step = 1
    with MetricsLogger(tmp_path, wandb_args=NO_WANDB, config={}) as metrics:
        with room_for(1000):
            # It writes in a thread of its own.
            while not any("/tb: " in r.getMessage() for r in caplog.records):
                metrics.log("train", step, {"loss": step})
                time.sleep(0.01)
                step += 1
                assert step < 5000
        metrics.log("train", step, {"loss": step})
    shown = scalars(tmp_path, "train/loss")
    assert shown[0] == (1, 1.0) and shown[-1] == (step, step)


@pytest.mark.parametrize("resumed_step", [None, 1], ids=["new", "resumed"])
def test_the_name_of_the_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed_step: int | None
) -> None:
    run = SimpleNamespace(id="2" * 2000)
    wandb = SimpleNamespace(
        init=lambda **_: run, Settings=dict, errors=SimpleNamespace(Error=KeyError)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    id_file = tmp_path / "wandb_run_id"
    if resumed_step:
        id_file.write_text("1\n")
    with room_for(1000), pytest.raises(UserError) as failing:
        MetricsLogger(tmp_path, wandb_args=WANDB, config={}, resumed_step=resumed_step)
    assert str(failing.value) == f"{id_file} cannot be written: {FULL}."
    found = [path.read_text() for path in tmp_path.glob("*wandb_run_id*")]
    assert found == (["1\n"] if resumed_step else [])


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that wandb was told."""
    codes: list[int] = []
    run = SimpleNamespace(
        id="2",
        dir="wandb/offline-run/files",
        define_metric=lambda *_, **__: None,
        log=lambda _: None,
        finish=lambda exit_code: codes.append(exit_code),
    )
    errors = SimpleNamespace(Error=KeyError)
    wandb = SimpleNamespace(init=lambda **_: run, Settings=dict, errors=errors)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return codes


def test_wandb_is_told_of_lines_that_could_not_be_written(
    tmp_path: Path, exit_codes: list[int]
) -> None:
    with room_for(1000), pytest.raises(UserError, match=FULL):  # noqa: SIM117
        with MetricsLogger(tmp_path, wandb_args=WANDB, config={}) as metrics:
            for step in range(1, 31):
                metrics.log("train", step, {"loss": step})
    assert exit_codes == [1]


@pytest.mark.parametrize("status", [0, 143])
def test_wandb_is_told_what_the_run_ends_with(
    tmp_path: Path, exit_codes: list[int], status: int
) -> None:
    with MetricsLogger(tmp_path, wandb_args=WANDB, config={}) as metrics:
        metrics.exit_status = status
    metrics.close()
    assert exit_codes == [status]
