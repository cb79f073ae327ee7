"""Dialogues on the disk are made once, to their end or again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import UserError
from finetune.spoken import Dataset, DatasetArgs, EncodedDialogues, build_dataset
from finetune.spoken import dataset as dataset_module

CPU = torch.device("cpu")
PARTS = ("train", "long", "eval", "x4")
Build = Callable[[int], Dataset]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build data of so many dialogues, which have no sound."""

    def dialogues(count: int) -> EncodedDialogues:
        codes = torch.zeros(count, 16, 1, dtype=torch.uint8)
        answers = torch.zeros(count, 1, 9, dtype=torch.int32)
        return EncodedDialogues(torch.zeros(count, 1, dtype=torch.int16), codes, answers)

    def speak(bank: Any, args: DatasetArgs, split: str, count: int, *_: Any) -> Any:
        return dialogues(count), []

    def recombined(pool: Any, args: Any, count: int, **_: Any) -> EncodedDialogues:
        return dialogues(count)

    class Bank:
        words = ()

        def __init__(self, *_: Any, **__: Any) -> None: ...

    for name, double in {
        "Bank": Bank,
        "open_codec": lambda device: None,
        "train_tokenizer": lambda args: b"tokens",
        "value_tokens": lambda text: None,
        "Pool": lambda *_: None,
        "_speak": speak,
        "recombine": recombined,
    }.items():
        monkeypatch.setattr(dataset_module, name, double)
    monkeypatch.setattr(Dataset, "text", None)

    def run(count: int) -> Dataset:
        args = DatasetArgs(
            num_spoken=count, num_train=count, num_long=count, num_eval=count, lengths={4: count}
        )
        return build_dataset(tmp_path / "data", args, CPU, workers=1)

    return run


def fails(*_: Any, **__: Any) -> Any:
    raise UserError("no espeak-ng")


def sizes(dataset: Dataset) -> list[int]:
    return [len(dataset.load(part)) for part in PARTS]


def test_data_are_made_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(build(2)) == [2, 2, 2, 2]
    monkeypatch.setattr(dataset_module, "_save", fails)
    assert sizes(build(2)) == [2, 2, 2, 2]


@pytest.mark.parametrize("num_parts", range(5))
def test_a_rebuild_that_was_interrupted_counts_for_nothing(
    build: Build, monkeypatch: pytest.MonkeyPatch, num_parts: int
) -> None:
    build(2)
    written: list[Path] = []

    def replaces(partial: Path, target: Path) -> None:
        if len(written) == 1 + num_parts:  # the tokenizer first
            raise KeyboardInterrupt
        written.append(target)
        partial.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaces)
        with pytest.raises(KeyboardInterrupt):
            build(3)
    dataset = build(2)
    assert sizes(dataset) == [2, 2, 2, 2]
    assert not [*dataset.folder.glob(".*")], "nothing half written is left"


def test_a_rebuild_that_cannot_begin_leaves_what_is_there(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(2)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "Bank", fails)
        with pytest.raises(UserError, match="no espeak-ng"):
            build(3)
    monkeypatch.setattr(dataset_module, "_save", fails)
    assert sizes(build(2)) == [2, 2, 2, 2]
