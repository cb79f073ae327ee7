"""A full disk leaves a run's metrics, and the name of its wandb run, as they were."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from full_disk import FULL, room_for

from finetune.errors import UserError
from finetune.monitoring import MetricsLogger, read_metrics

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
