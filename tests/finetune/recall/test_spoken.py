"""The experiment with spoken facts, on dialogues of random codes."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.recall import RecallOptions, run_command
from finetune.recall.spoken import command, measure, presets, training
from finetune.recall.spoken.experiment import run_arm
from finetune.recall.spoken.presets import SpokenPreset
from finetune.spoken import Answer, BankArgs, DatasetArgs, DialogueArgs, EncodedDialogues
from finetune.spoken import dataset as dataset_module
from finetune.spoken.dataset import Dataset
from finetune.spoken.tokenizer import train_tokenizer

FRAMES, ROWS, FACTS = 80, 8, 1


def tiny() -> SpokenPreset:
    data = DatasetArgs(
        BankArgs(num_voices=1, kinds=("thing",), num_fillers=(2, 2)),
        DialogueArgs(num_frames=FRAMES, num_facts=FACTS, reach_frames=20),
        num_spoken=ROWS,
        num_train=ROWS,
        num_long=ROWS,
        long_times=2,
        num_eval=ROWS,
        lengths={4: 2},
    )
    chosen = presets.preset("cpu")
    model = dataclasses.replace(chosen.model, width=32, num_layers=2, num_heads=2, context=11)
    sizes = {
        "num_steps": 2,
        "finetune_steps": 2,
        "batch_size": 4,
        "audio_rows": 1,
        "num_free": 2,
        "long_share": 0.5,
    }
    return dataclasses.replace(chosen, data=data, model=model, **sizes)  # type: ignore[arg-type]


def dialogues(rows: int, frames: int, seed: int) -> EncodedDialogues:
    random = torch.Generator().manual_seed(seed)
    text = torch.full((rows, frames), 3, dtype=torch.int16)
    codes = torch.randint(256, (rows, 16, frames), generator=random, dtype=torch.uint8)
    repeated = [frames - 10, 0, 1, 1, 60, frames - 30, 10, 0, 0]
    heard = [frames - 5, 0, 2, 0, 60, 55, 9, 0, 1]
    asked = repeated, heard
    answers = torch.tensor([[asked[row % 2]] for row in range(rows)], dtype=torch.int32)
    return EncodedDialogues(text, codes, answers)


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_tokenizer(tiny().data.bank)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment's folder in which the data are already."""
    chosen = tiny()
    monkeypatch.setattr(command, "preset", lambda name: chosen)
    data = tmp_path / "out" / "data"
    data.mkdir(parents=True)
    for name, rows, times in (
        ("train", ROWS, 1),
        ("long", ROWS, 2),
        ("eval", ROWS, 1),
        ("x4", 2, 4),
    ):
        part = dialogues(rows, times * FRAMES, rows)
        dataset_module._save(part, data / f"{name}.safetensors")
    (data / "tokenizer.model").write_bytes(tokenizer)
    described = {"version": dataset_module.DATA_VERSION, **dataclasses.asdict(chosen.data)}
    (data / "dataset.json").write_text(json.dumps(described))
    return tmp_path / "out"


def test_long_talks_come_in_turn_with_short_ones_at_the_end() -> None:
    assert training.schedule([6, 2]) == [0, 0, 0, 0, 0, 1, 0, 1]
    assert training.schedule([1, 3]) == [1, 1, 0, 1]
    assert training.schedule([0, 2]) == [1, 1] and training.schedule([2]) == [0, 0]


def test_arms_are_trained_measured_and_not_run_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = RecallOptions(
        out=folder, variant="spoken", arms=("delta_hidden", "finetuned_hidden"), device="cpu"
    )
    report = run_command(options)
    for line in (
        "delta_hidden, nothing written",
        "delta_hidden, reset before the question",
        "delta_hidden, another dialogue's past",
        "finetuned_hidden | 4 |",
    ):
        assert f"| {line}" in report
    assert (folder / "recall.png").stat().st_size > 1000
    assert (folder / "report.md").read_text() == report + "\n"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run_command(options) == report
    assert not any("step" in record.message for record in caplog.records)
    kept = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=r"is of other options \(.*num_steps: "):
        run_command(dataclasses.replace(options, steps=7))
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_what_was_trained_before_measuring_was_interrupted_is_measured(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RecallOptions(out=folder, variant="spoken", arms=("delta_hidden",), device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "free", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_command(options)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report = run_command(options)
    assert not any("step" in record.message for record in caplog.records)
    (folder / "runs/delta_hidden_seed0.json").unlink()
    (folder / "runs/delta_hidden_seed0.model.safetensors").unlink()
    assert run_command(options) == report, "as if never interrupted"


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_fine_tuning_starts_from_the_model_without_ttt(folder: Path) -> None:
    chosen = dataclasses.replace(tiny(), num_steps=2, ttt_lr=0.0)
    runs = folder / "runs"
    runs.mkdir()
    for name in ("off", "finetuned_hidden"):
        run_arm(chosen, name, 0, torch.device("cpu"), runs, folder / "data")
    off, tuned = (
        load_file(runs / f"{name}_seed0.model.safetensors") for name in ("off", "finetuned_hidden")
    )
    assert set(off) < set(tuned)
    assert all(torch.equal(off[name], tuned[name]) for name in off)


def test_lost_weights_of_the_model_without_ttt_are_named(folder: Path) -> None:
    (folder / "runs").mkdir()
    with pytest.raises(
        UserError, match=r"off_seed0\.model\.safetensors is gone.* delete off_seed0"
    ):
        run_arm(tiny(), "retrained", 0, torch.device("cpu"), folder / "runs", folder / "data")


def test_only_the_oldest_fact_not_yet_asked_for_is_known_by_the_queue() -> None:
    def talk(*orders: int) -> list[list[int]]:
        nothing = Answer(*[-1] * len(Answer._fields))
        rows = [nothing._replace(frame=10 * i, order=order) for i, order in enumerate(orders)]
        return [list(row) for row in [*rows, *[nothing] * (3 - len(rows))]]

    def share(*orders: int) -> float:
        rows = torch.tensor([talk(*orders)])
        return measure.queue_accuracy(EncodedDialogues(rows, rows, rows))

    assert share(0, 1, 2) == 1
    assert share(2, 1, 0) == pytest.approx(1 / 3)
    assert share(1, 0) == 0.5
    assert share(2, 1) == 0


def test_the_data_of_the_presets_can_be_made() -> None:
    for name in ("cpu", "gpu"):
        chosen = presets.preset(name)
        assert chosen.data.dialogues.problems() == []
        assert chosen.data.dialogues.reach_frames == chosen.model.reach_frames
        assert Dataset(Path(), chosen.data).args == chosen.data
