"""Batches made ahead: the same ones, in the same order, with errors where they belong."""

import json
import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from data_tools import tiny_codec, write_dataset
from moshi.utils.compile import CUDAGraphed
from training_tools import logged, train, trainer

from finetune.config import DataArgs
from finetune.data import Codec, build_eval_loader, build_train_loader
from finetune.data.loader import TrainLoader
from finetune.data.prefetch import Prefetcher
from finetune.errors import UserError
from finetune.evaluation.codes import Silence
from ttt import eager_streaming


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


def settled(log: list[Any], length: int) -> list[Any]:
    """What was made when `length` items are there, and a moment later; a busy machine may need long
    for the first."""
    give_up_at = time.monotonic() + 60
    while len(log) < length and time.monotonic() < give_up_at:
        time.sleep(0.01)
    time.sleep(0.05)
    return list(log)


def test_it_works_so_far_ahead_and_no_further() -> None:
    log: list[Any] = []
    ahead = Prefetcher(counting(100, log), depth=3)
    assert settled(log, 3) == [0, 1, 2]
    assert [next(ahead), next(ahead)] == [0, 1]
    assert settled(log, 5) == [0, 1, 2, 3, 4]
    ahead.close()
    assert settled(log, 6)[-1] == "closed"
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


def test_speech_is_checked_while_audio_is_encoded(config: Path, tmp_path: Path) -> None:
    """Both need Mimi, which remembers what it is in the middle of."""
    options = {
        "data.train_data": str(write_dataset(tmp_path / "long", [20.0] * 12)),
        "data.eval_data": str(write_dataset(tmp_path / "eval", [20.0], seed=50)),
        "data.cache_dir": None,
        "data.prefetch_steps": 2,
        "duration_sec": 20.0,
        "do_eval": True,
        "eval_freq": 1,
        "health_sec": 1.0,
        "max_steps": 6,
    }
    train(config, tmp_path / "run", options)
    assert (
        len(logged(tmp_path / "run", "health/entropy", kind="eval")) == 7
    )  # before the first step too


class ToldLock:
    """A lock that tells when somebody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize(
    "use",
    [
        lambda codec: codec.decode(torch.zeros(1, codec.moshi_codebooks, 2, dtype=torch.int64)),
        lambda codec: list(codec.encode_blocks([torch.zeros(1, codec.mimi.frame_size)], 1)),
        lambda codec: Silence(codec).codes(2),
    ],
)
def test_mimi_is_used_by_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[Codec], Any]
) -> None:
    codec, lock = tiny_codec(), ToldLock()
    monkeypatch.setattr(codec, "lock", lock)
    blocks = codec.encode_blocks(iter(torch.zeros(3, 1, codec.mimi.frame_size)), 1)
    next(blocks)
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(use, codec)
        while not used.done() and not lock.is_waited_for.wait(timeout=0.01):
            pass
        assert lock.is_waited_for.is_set() and not used.done()
        list(blocks)
        assert used.exception(timeout=60) is None


def test_streams_without_cuda_graphs_leave_those_of_other_threads_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, other = (deepcopy(tiny_codec().mimi) for _ in range(3))
    # As on a GPU, where streams record graphs at their second step.
    monkeypatch.setattr(CUDAGraphed, "__init__", partialmethod(_graphed, CUDAGraphed.__init__))
    audio = torch.zeros(1, 1, first.frame_size)
    entered, left = eager_streaming(first, 1), eager_streaming(second, 1)
    entered.__enter__(), left.__enter__()
    entered.__exit__(None, None, None)  # as threads may: who came first goes first
    for _ in range(3):
        second.encode(audio)
    left.__exit__(None, None, None)
    with other.streaming(1), pytest.raises(RuntimeError, match=r"CUDA|cuda"):
        for _ in range(3):
            other.encode(audio)


def _graphed(self: CUDAGraphed, make: Callable[..., None], func: Any, **_: Any) -> None:
    make(self, func)


def test_a_run_that_fails_leaves_no_thread_behind(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(config, tmp_path, {"data.prefetch_steps": 2})
    monkeypatch.setattr(run, "forward_backward", lambda batches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
