"""The options that change what is read of a recording: sides, room tone, how words begin."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from data_tools import some_words, speech_like, tiny_codec, tiny_tokenizer, write_jsonl

from finetune.config import DataArgs
from finetune.data import (
    CacheFill,
    TextEncoder,
    build_eval_loader,
    build_train_loader,
    check_recordings,
    open_store,
)
from finetune.data.reading import Reading
from finetune.data.store import Store
from finetune.errors import UserError

RATE_HZ = 24000


def write_dialogue(folder: Path, *, samples: np.ndarray | None = None) -> Path:
    """2 s: Moshi says some words on the left, the user "fine" and "thanks" on the right."""
    folder.mkdir(exist_ok=True)
    samples = speech_like(2.0, RATE_HZ) if samples is None else samples
    soundfile.write(folder / "a.wav", samples, RATE_HZ, subtype="FLOAT")
    words = [
        *some_words(2.0),
        ["fine", [0.5, 0.6], "SPEAKER_USER"],
        ["thanks", [1.5, 1.7], "SPEAKER_USER"],
    ]
    (folder / "a.json").write_text(json.dumps({"alignments": words}))
    return write_jsonl(folder / "all.jsonl", [{"path": "a.wav", "duration": 2.0}])


def loaded(
    path: Path, *, store: Store | None = None, codec: Any = None, **options: Any
) -> torch.Tensor:
    """All segments of training data, in order: `[segments, 17, 13]`."""
    args = DataArgs(train_data=str(path), num_workers=0, **options)
    loader = build_train_loader(
        args, codec or tiny_codec(), duration_sec=1.0, batch_size=1, seed=0, device="cpu",
        store=store,
    )  # fmt: skip
    codes = torch.cat([next(loader).codes for _ in range(loader.num_segments)])
    loader.close()
    return codes


def words_of(row: Any) -> str:
    return tiny_codec().detokenize(row[0])


def test_moshi_may_be_on_the_right(tmp_path: Path) -> None:
    plain = loaded(write_dialogue(tmp_path))
    turned = loaded(tmp_path / "all.jsonl", main_channel="right")
    assert torch.equal(turned[:, 1:9], plain[:, 9:]) and torch.equal(turned[:, 9:], plain[:, 1:9])
    assert torch.equal(turned[:, 0], plain[:, 0])


def test_a_silent_channel_is_named_by_its_side(tmp_path: Path) -> None:
    samples = speech_like(2.0, RATE_HZ)
    samples[:, 1] = 0
    path = write_dialogue(tmp_path, samples=samples)
    assert len(loaded(path)) == 2
    with pytest.raises(UserError, match=r"the right channel is silent in .*put Moshi on the right"):
        loaded(path, main_channel="right")


def test_each_dialogue_comes_from_its_other_side_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = loaded(write_dialogue(tmp_path))
    with caplog.at_level(logging.WARNING):
        both = loaded(tmp_path / "all.jsonl", swap_channels=True)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert torch.equal(both[:2], plain) and len(both) == 4
    assert torch.equal(both[2:, 1:9], plain[:, 9:]) and torch.equal(both[2:, 9:], plain[:, 1:9])
    assert [words_of(row) for row in both[2:]] == ["fine", "thanks"]

    args = DataArgs(eval_data=str(tmp_path / "all.jsonl"), num_workers=0, swap_channels=True)
    evaluated = build_eval_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=1, device="cpu", store=None
    )
    assert evaluated.num_segments == 2


def test_codes_are_kept_for_each_way_of_reading(tmp_path: Path) -> None:
    path = write_dialogue(tmp_path)
    ways: list[dict[str, Any]] = [
        {},
        {"main_channel": "right"},
        {"swap_channels": True},
        {"room_tone": -60.0},
    ]
    for way in (*ways, *ways):
        cached: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), **way}
        args = DataArgs(train_data=str(path), num_workers=0, **cached)
        assert torch.equal(loaded(path, store=open_store(args), **cached), loaded(path, **way))
        fill = CacheFill(
            args, tiny_codec(), duration_sec=1.0, store=open_store(args), with_eval=False,
            rank=0, world_size=1,
        )  # fmt: skip
        assert fill.num_missing == 0


def test_room_tone_replaces_digital_silence_alone(tmp_path: Path) -> None:
    samples = speech_like(2.0, RATE_HZ)
    samples[10_000:40_000, 1] = 0
    path = write_dialogue(tmp_path, samples=samples)
    (recording,), _ = check_recordings(str(path), key="data", reading=Reading(room_tone_dbfs=-60.0))
    whole = recording.read_audio(0, 48_000, RATE_HZ)
    silent = torch.from_numpy(samples.T) == 0
    assert torch.equal(whole[~silent], torch.from_numpy(samples.T)[~silent])
    level_db = 20 * np.log10(whole[silent].square().mean().sqrt())
    assert level_db == pytest.approx(-60, abs=0.3)
    # The same wherever reading begins, also at a rate of which a second is no whole block.
    for start, num in [(0, 20_000), (9_000, 30_000), (23_999, 2)]:
        assert torch.equal(recording.read_audio(start, num, RATE_HZ), whole[:, start : start + num])
    assert torch.equal(recording.read_audio(30_000, 0, RATE_HZ), torch.zeros(2, 0))


def test_how_words_begin() -> None:
    tokenizer = tiny_tokenizer()
    ways = {way: TextEncoder(tokenizer, word_start=way) for way in ("auto", "always", "never")}
    assert ways["auto"].tokenize("hello") == ways["always"].tokenize("hello")
    pieces = tokenizer.id_to_piece(ways["never"].tokenize("hello"))
    assert "".join(pieces) == "hello"
    for word in ("本当に", "カタカナ", "ไทย"):
        assert ways["auto"].tokenize(word) == ways["never"].tokenize(word)
        assert len(ways["always"].tokenize(word)) == len(ways["never"].tokenize(word)) + 1
    assert len({text.fingerprint for text in ways.values()}) == 3
