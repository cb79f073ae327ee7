"""From recordings and word times to batches: what a model is fed, and in which order."""

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from data_tools import (
    speech_like,
    tiny_codec,
    tiny_mimi,
    write_dataset,
    write_jsonl,
    write_recording,
)
from torchaudio.functional import resample

from finetune.config import DataArgs, parse_sources, require_sources
from finetune.data import (
    Word,
    build_eval_loader,
    build_train_loader,
    count_frames,
    read_audio,
    text_stream,
    tokenize_segment,
)
from finetune.data.loader import EvalLoader, TrainLoader
from finetune.data.order import SampleOrder
from finetune.data.text import TimedTokens
from finetune.errors import UserError

PAD, END = 3, 0


def stream(words: list[Any], num_frames: int) -> list[int]:
    timed = [TimedTokens(start, tokens) for start, tokens in words]
    return text_stream(timed, num_frames, text_padding_id=PAD, end_of_text_padding_id=END)


def train_loader(args: DataArgs, **changes: Any) -> TrainLoader:
    settings: dict[str, Any] = {"duration_sec": 1.0, "batch_size": 2, "seed": 0}
    settings |= {"device": "cpu", "store": None, **changes}
    return build_train_loader(args, tiny_codec(), **settings)


def eval_loader(args: DataArgs, **changes: Any) -> EvalLoader:
    settings: dict[str, Any] = {"duration_sec": 1.0, "batch_size": 2, "device": "cpu"}
    settings |= {"store": None, **changes}
    return build_eval_loader(args, tiny_codec(), **settings)


# --- the text stream -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [3, 3, 3, 3, 3, 3]),
        # A word on the first frame has no frame before it.
        ([(0.0, [10, 11])], [10, 11, 3, 3, 3, 3]),
        # The frame before a word is end-of-padding.
        ([(2.9, [10, 11])], [3, 0, 10, 11, 3, 3]),
        # It starts in the frame that holds its start, also at the very edge of a frame.
        ([(3.0, [10])], [3, 3, 0, 10, 3, 3]),
        # Directly after another word there is no padding to end.
        ([(1.0, [10, 11]), (3.0, [12])], [0, 10, 11, 12, 3, 3]),
        # A word replaces what is left of the one before.
        ([(1.0, [10, 11, 12, 13]), (3.2, [20])], [0, 10, 11, 20, 3, 3]),
        # Of several words that start in one frame the last one stays.
        ([(2.1, [10]), (2.5, [20, 21]), (2.8, [30, 31])], [3, 0, 30, 31, 3, 3]),
        # What does not fit is cut.
        ([(4.5, [10, 11, 12])], [3, 3, 3, 0, 10, 11]),
        # A word without tokens ends the word before as any other.
        ([(1.0, [10, 11, 12]), (2.0, [])], [0, 10, 3, 3, 3, 3]),
    ],
)
def test_text_stream(words: Any, expected: list[int]) -> None:
    assert stream(words, 6) == expected


def test_segment_takes_the_main_speakers_words_that_start_in_it() -> None:
    words = [
        Word("late", 3.99, 4.5, "SPEAKER_MAIN"),
        Word("first", 2.0, 2.3, "SPEAKER_MAIN"),
        Word("before", 1.99, 2.5, "SPEAKER_MAIN"),
        Word("after", 4.0, 4.5, "SPEAKER_MAIN"),
        Word("other", 2.5, 3.0, "SPEAKER_USER"),
        Word("empty", 2.6, 2.6, "SPEAKER_MAIN"),
        Word("backwards", 2.7, 2.6, "SPEAKER_MAIN"),
    ]
    timed = tokenize_segment(words, 25, 25, lambda word: [len(word)])
    assert [tokens for _, tokens in timed] == [[5], [4]]
    assert [start for start, _ in timed] == pytest.approx([0.0, 24.875])


def test_words_are_tokenized_alone_without_bos() -> None:
    codec = tiny_codec()
    assert codec.tokenize(" hello ") == codec.tokenize("hello")
    assert codec.tokenizer.bos_id() not in codec.tokenize("hello")
    assert codec.tokenizer.decode(codec.tokenize("hello")) == "hello"


def test_segments_are_whole_frames() -> None:
    lengths_sec: dict[float, int] = {1.0: 13, 1.04: 13, 0.24: 3, 1.05: 14, 100: 1250, 30: 375}
    assert {sec: count_frames(sec) for sec in lengths_sec} == lengths_sec


# --- audio ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [16000, 22050, 24000, 44100, 48000])
def test_a_part_equals_the_same_part_of_the_whole(tmp_path: Path, rate_hz: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, speech_like(3.01, rate_hz), rate_hz, subtype="FLOAT")
    samples, _ = soundfile.read(path, dtype="float32")
    whole = resample(torch.from_numpy(samples.T.copy()), rate_hz, 24000)
    for start, length in [(0, 1920), (1920, 24000), (30001, 777), (48000, 48000), (72000, 1920)]:
        part = read_audio(path, start, length, 24000)
        torch.testing.assert_close(part, whole[:, start : start + length], atol=1e-6, rtol=0)
    assert whole.shape[1] == pytest.approx(3.01 * 24000, abs=1)


@pytest.mark.parametrize("name", ["a.flac", "a.mp3", "a.ogg"])
def test_compressed_formats(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, speech_like(3.0, 44100), 44100)
    whole = read_audio(tmp_path / name, 0, 72000, 24000)
    assert whole.shape == (2, 72000)
    part = read_audio(tmp_path / name, 38400, 19200, 24000)
    torch.testing.assert_close(part, whole[:, 38400:57600], atol=1e-5, rtol=0)


# --- codes ---------------------------------------------------------------------------------


def test_batch_holds_text_and_both_channels(tmp_path: Path) -> None:
    jsonl = write_dataset(tmp_path, [2.0])
    loader = train_loader(DataArgs(train_data=str(jsonl), num_workers=0), batch_size=2)
    batch = next(loader)
    assert batch.codes.shape == (2, 17, 13) and batch.codes.dtype == torch.int64
    # Words "hello" at 0.1 s and "there" at 0.6 s: frames 1 and 7.
    codec = tiny_codec()
    hello, there = codec.tokenize("hello"), codec.tokenize("there")
    expected = stream([(1.25, hello), (7.5, there)], 13)
    assert batch.codes[0, 0].tolist() == expected

    samples, _ = soundfile.read(tmp_path / "0.wav", dtype="float32")
    first = torch.from_numpy(samples[: 13 * 1920].T.copy())
    with torch.no_grad():
        left, right = tiny_mimi().encode(first[:, None])
    assert torch.equal(batch.codes[0, 1:9], left)
    assert torch.equal(batch.codes[0, 9:], right)
    assert len(left.unique()) > 5 and not torch.equal(left, right)
    assert not tiny_mimi().is_streaming


def test_after_the_end_everything_is_minus_one_and_nothing_before_changes(tmp_path: Path) -> None:
    # 1.7 s: a whole segment of 13 frames, then 8.25 frames. 1.05 s: a rest of less than a frame.
    jsonl = write_dataset(tmp_path, [1.7, 1.05])
    loader = eval_loader(DataArgs(eval_data=str(jsonl), num_workers=0), batch_size=4)
    (batch,) = loader
    assert loader.num_segments == 3
    whole, rest, second = batch.codes
    assert (rest[:, 9:] == -1).all() and (rest[:, :9] >= 0).all()
    assert (whole >= 0).all() and (second >= 0).all()
    assert batch.audio_sec == pytest.approx(35 * 0.08)

    samples, _ = soundfile.read(tmp_path / "0.wav", dtype="float32")
    tail = torch.from_numpy(samples[13 * 1920 :].T.copy())
    with torch.no_grad():
        alone = tiny_mimi().encode(tail[:, None])
    assert torch.equal(rest[1:, :9], alone.flatten(0, 1))


# --- order ---------------------------------------------------------------------------------


def take(loader: TrainLoader, count: int) -> list[Any]:
    batches = [batch.codes for batch in itertools.islice(loader, count)]
    loader.close()
    return batches


def test_sources_are_mixed_in_proportion() -> None:
    order = SampleOrder([7, 5, 3], [1.0, 2.0, 0.5], seed=0, shuffle=True)
    drawn = [source for source, _ in itertools.islice(order.walk(0), 700)]
    assert Counter(drawn) == {0: 200, 1: 400, 2: 100}
    for length in range(1, 700):
        counts = Counter(drawn[:length])
        for source, share in enumerate((2 / 7, 4 / 7, 1 / 7)):
            assert abs(counts[source] - share * length) <= 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_visits_every_segment_once(shuffle: bool) -> None:
    order = SampleOrder([10], [1.0], seed=3, shuffle=shuffle)
    drawn = [segment for _, segment in itertools.islice(order.walk(0), 30)]
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert (epochs[0] == list(range(10))) is not shuffle
    assert (epochs[0] == epochs[1]) is not shuffle


def test_order_continues_from_any_sample() -> None:
    order = SampleOrder([7, 5], [0.3, 0.7], seed=1, shuffle=True)
    everything = list(itertools.islice(order.walk(0), 100))
    for start in (0, 1, 37, 99):
        assert list(itertools.islice(order.walk(start), 100 - start)) == everything[start:]


def test_weights_of_sources() -> None:
    pairs = parse_sources("a.jsonl:2, C:\\b.jsonl ,s3:c.jsonl:.5,d:1e1,", "data.train_data")
    assert [(str(path), weight) for path, weight in pairs] == [
        ("a.jsonl", 2.0), ("C:\\b.jsonl", 1.0), ("s3:c.jsonl", 0.5), ("d", 10.0),
    ]  # fmt: skip


def test_a_weight_that_is_no_number_is_called_so(tmp_path: Path) -> None:
    listed = tmp_path / "a.jsonl"
    listed.write_text("{}\n")
    with pytest.raises(UserError, match=r"If 'two' is to be the weight of .*a\.jsonl, it must be"):
        require_sources([path for path, _ in parse_sources(f"{listed}:two", "k")], "k")
    with pytest.raises(UserError, match=r"b\.jsonl:two does not exist\. Correct the path\."):
        require_sources([tmp_path / "b.jsonl:two"], "k")


def test_a_source_has_its_weight_in_what_is_drawn(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a", [3.2, 2.1])
    b = write_dataset(tmp_path / "b", [2.2], seed=10)
    loader = train_loader(DataArgs(train_data=f"{a}:2,{b}", num_workers=0), batch_size=4)
    shares = loader.segment_shares
    only_a = train_loader(DataArgs(train_data=str(a), num_workers=0), batch_size=4).num_segments
    assert len(shares) == len(loader.segment_frames) == loader.num_segments > only_a
    assert sum(shares[:only_a]) == pytest.approx(2 / 3)
    assert sum(shares[only_a:]) == pytest.approx(1 / 3)


def test_ranks_share_the_order(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a", [3.2, 2.1])
    b = write_dataset(tmp_path / "b", [2.2], seed=10)
    args = DataArgs(train_data=f"{a}:2,{b.parent}", shuffle=True, num_workers=0)
    alone = take(train_loader(args, batch_size=4), 4)
    ranks = [take(train_loader(args, batch_size=2, rank=r, world_size=2), 4) for r in range(2)]
    for step in range(4):
        assert torch.equal(alone[step], torch.cat([ranks[0][step], ranks[1][step]]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_exactly(tmp_path: Path, num_workers: int) -> None:
    jsonl = write_dataset(tmp_path, [3.2, 2.1, 1.5])
    args = DataArgs(train_data=str(jsonl), shuffle=True, num_workers=num_workers)
    expected = take(train_loader(args, batch_size=4), 5)

    first = train_loader(args, batch_size=4)
    assert torch.equal(next(first).codes, expected[0])
    assert torch.equal(next(first).codes, expected[1])
    # Workers have read ahead by now; the state must not show it.
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert first.epoch == pytest.approx(8 / first.num_segments)

    resumed = train_loader(args, batch_size=4)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, take(resumed, 3), expected[2:]))
    # On two ranks with half the batch, and on a loader that has already begun.
    for rank in range(2):
        resumed = train_loader(args, batch_size=2, rank=rank, world_size=2)
        next(resumed)
        resumed.load_state_dict(state)
        rows = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(next(resumed).codes, expected[2][rows])
        resumed.close()


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    args = DataArgs(train_data=str(write_dataset(tmp_path, [1.0])), shuffle=True, num_workers=1)
    before = torch.get_rng_state()
    take(train_loader(args), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_resuming_on_changed_data_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jsonl = write_dataset(tmp_path, [1.2, 1.3])
    args = DataArgs(train_data=str(jsonl), num_workers=0)
    state = train_loader(args).state_dict()
    with caplog.at_level(logging.WARNING):
        train_loader(args).load_state_dict(state)
        assert "since the checkpoint" not in caplog.text
        train_loader(args, seed=1).load_state_dict(state)
    assert "changed since the checkpoint" in caplog.text


# --- evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_evaluation_is_a_fresh_complete_pass(tmp_path: Path, num_workers: int) -> None:
    a = write_dataset(tmp_path / "a", [3.2, 2.1])
    b = write_dataset(tmp_path / "b", [1.0], seed=10)
    args = DataArgs(eval_data=f"{a}:5,{b}", num_workers=num_workers)
    loader = eval_loader(args)
    next(iter(loader))  # an abandoned pass must not matter
    passes = [[batch.codes for batch in loader] for _ in range(2)]
    assert [len(codes) for codes in passes[0]] == [2, 2, 2, 1] and len(loader) == 4
    assert loader.num_segments == 7
    assert torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))

    ranks = [eval_loader(args, rank=rank, world_size=4) for rank in range(4)]
    shared = [torch.cat([batch.codes for batch in loader]) for loader in ranks]
    assert [len(codes) for codes in shared] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(passes[0])[1::4], shared[1])


def test_absolute_paths_blank_lines_and_silent_moshi(tmp_path: Path) -> None:
    line = write_recording(tmp_path, "x.wav", 1.0, rate_hz=48000)
    (tmp_path / "x.json").write_text('{"alignments": []}')
    line["path"] = str(tmp_path / "x.wav")
    (tmp_path / "lists").mkdir()
    write_jsonl(tmp_path / "lists" / "a.jsonl", ["", line, ""])
    (batch,) = eval_loader(DataArgs(eval_data=str(tmp_path / "lists"), num_workers=0))
    assert (batch.codes[0, 0] == 3).all()
    assert np.all(batch.codes.numpy() >= 0)
