"""Batches made ahead: the same ones, in the same order, with errors where they belong."""

import json
import logging
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from data_tools import tiny_codec, write_dataset
from training_tools import logged, train, trainer

from finetune.config import DataArgs
from finetune.data import build_eval_loader, build_train_loader
from finetune.data.loader import TrainLoader
from finetune.data.prefetch import Prefetcher
from finetune.errors import UserError


def counting(
    limit: int, log: list[Any], error: UserError | None = None
) -> Generator[int, None, None]:
    try:
        for number in range(limit):
            log.append(number)
            yield number
        if error is not None:
            raise error
    finally:
        log.append("closed")


def settle(log: list[Any]) -> list[Any]:
    """What was made when nothing more comes."""
    length = -1
    while length != len(log):
        length = len(log)
        time.sleep(0.05)
    return list(log)


def test_it_works_so_far_ahead_and_no_further() -> None:
    log: list[Any] = []
    ahead = Prefetcher(counting(100, log), depth=3)
    assert settle(log) == [0, 1, 2]
    assert [next(ahead), next(ahead)] == [0, 1]
    assert settle(log) == [0, 1, 2, 3, 4]
    ahead.close()
    assert settle(log)[-1] == "closed"
    with pytest.raises(StopIteration):
        next(ahead)


def test_the_end_and_errors_come_after_the_items_before_them() -> None:
    log: list[Any] = []
    assert list(Prefetcher(counting(5, log), depth=2)) == [0, 1, 2, 3, 4]
    ahead = Prefetcher(counting(2, log, UserError("broken")), depth=9)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(UserError, match="broken") as caught:
        next(ahead)
    assert caught.value.__cause__ is None and log[-1] == "closed"
    with pytest.raises(StopIteration):
        next(ahead)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


# --- the loaders ----------------------------------------------------------------------------------


def loader(jsonl: Path, **changes: Any) -> TrainLoader:
    args = DataArgs(train_data=str(jsonl), shuffle=True, **({"num_workers": 0} | changes))
    return build_train_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=2, seed=0, device="cpu", store=None
    )


def take(batches: TrainLoader, count: int) -> list[Any]:
    return [next(batches).codes for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_is_that_of_what_was_handed_out(tmp_path: Path, num_workers: int) -> None:
    jsonl = write_dataset(tmp_path, [3.2, 2.1, 1.5])
    expected = take(loader(jsonl, prefetch_steps=0), 9)
    first = loader(jsonl, prefetch_steps=3, num_workers=num_workers)
    assert all(map(torch.equal, take(first, 3), expected))
    state = json.loads(json.dumps(first.state_dict()))
    assert state["num_samples"] == 6 and first.num_encoded == 6
    for resumed in (first, loader(jsonl, prefetch_steps=3, num_workers=num_workers)):
        resumed.load_state_dict(state)
        assert all(map(torch.equal, take(resumed, 6), expected[3:]))
        resumed.close()


def test_training_and_evaluation_in_turn(tmp_path: Path) -> None:
    jsonl = write_dataset(tmp_path, [3.2, 2.1, 1.5])
    expected = take(loader(jsonl), 9)
    codec = tiny_codec()
    args = DataArgs(
        str(jsonl), str(jsonl), shuffle=True, num_workers=1, prefetch_steps=2,
    )  # fmt: skip
    options: dict[str, Any] = {"duration_sec": 1.0, "batch_size": 2, "device": "cpu", "store": None}
    training = build_train_loader(args, codec, seed=0, **options)
    evaluation = build_eval_loader(args, codec, **options)
    passes: list[Any] = []
    for step in range(9):
        assert torch.equal(next(training).codes, expected[step])
        if step % 4 == 0:
            passes.append(torch.cat([batch.codes for batch in evaluation]))
    assert torch.equal(passes[0], passes[1]) and torch.equal(passes[0], passes[2])
    training.close()


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_broken_file_is_met_at_its_own_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_error: Literal["raise", "skip"]
) -> None:
    jsonl = write_dataset(tmp_path, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    args = DataArgs(str(jsonl), num_workers=0, prefetch_steps=2, on_error=on_error)
    batches = build_train_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=2, seed=0, device="cpu", store=None
    )
    (tmp_path / "4.wav").unlink()
    assert [next(batches).num_skipped for _ in range(2)] == [0, 0]
    if on_error == "raise":
        with pytest.raises(UserError, match=r"all.jsonl:5: .*4\.wav cannot be read"):
            next(batches)
        assert batches.state_dict()["num_samples"] == 4
    else:
        with caplog.at_level(logging.WARNING):
            assert next(batches).num_skipped == 1 and batches.num_skipped == 1
    state = batches.state_dict()
    batches.close()
    if on_error == "skip":
        resumed = build_train_loader(
            args, tiny_codec(), duration_sec=1.0, batch_size=2, seed=0, device="cpu", store=None
        )
        lines_left_out = resumed.num_skipped
        resumed.load_state_dict(state)
        assert lines_left_out == 1 and resumed.num_skipped == 2
        resumed.close()


# --- whole runs -----------------------------------------------------------------------------------


def test_working_ahead_changes_no_loss(config: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_microbatches": 2, "do_eval": True, "eval_freq": 2}
    train(config, tmp_path / "in turn", options | {"data.prefetch_steps": 0})
    for num_workers in (0, 1):
        ahead = options | {"data.prefetch_steps": 2, "data.num_workers": num_workers}
        train(config, tmp_path / str(num_workers), ahead)
        for kind in ("train", "eval"):
            expected = logged(tmp_path / "in turn", kind=kind)
            assert logged(tmp_path / str(num_workers), kind=kind) == expected
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_run_that_fails_leaves_no_thread_behind(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(config, tmp_path, {"data.prefetch_steps": 2})
    monkeypatch.setattr(run, "forward_backward", lambda batches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
