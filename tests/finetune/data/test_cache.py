"""Codes on disk as loaders use them: encoded once, found again, never trusted when damaged."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from data_tools import MIMI_CONFIG, speech_like, tiny_codec, tiny_mimi, write_dataset
from moshi.models.loaders import get_mimi

from finetune.command_line import run
from finetune.config import DataArgs
from finetune.data import (
    Codec,
    build_eval_loader,
    build_train_loader,
    check_share,
    open_store,
    sources,
)
from finetune.data.loader import TrainLoader
from finetune.data.store import Store
from finetune.errors import UserError

# --- the loaders ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", [3.2, 2.1, 1.5])
    return tmp_path / "data"


def loader(data: Path, cache: Path | None, *, own_codec: Any = None, **changes: Any) -> TrainLoader:
    args = DataArgs(
        train_data=str(data / "all.jsonl"),
        shuffle=True,
        cache_dir=None if cache is None else str(cache),
        **({"num_workers": 0} | changes),
    )
    return build_train_loader(
        args, own_codec or tiny_codec(), duration_sec=1.0, batch_size=4, seed=0, device="cpu",
        store=open_store(args),
    )  # fmt: skip


def epochs(
    data: Path, cache: Path | None, *, num: int = 2, **changes: Any
) -> tuple[torch.Tensor, Any]:
    """The codes of some epochs of two batches, and how many segments Mimi encoded."""
    batches = loader(data, cache, **changes)
    codes = torch.cat([next(batches).codes for _ in range(2 * num)])
    batches.close()
    return codes, batches.num_encoded


def forbid_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr("finetune.data.sides.read_audio", refuse)
    monkeypatch.setattr("finetune.data.sides.inspect_audio", refuse)


def test_a_second_run_encodes_nothing_and_opens_no_recording(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, encoded = epochs(data, None)
    assert encoded == 8 and len(plain) == 16
    cold = epochs(data, tmp_path / "cache")
    assert torch.equal(cold[0], plain) and cold[1] == 8
    forbid_audio(monkeypatch)
    warm = epochs(data, tmp_path / "cache")
    assert torch.equal(warm[0], plain) and warm[1] == 0


def test_with_nothing_kept_in_memory_the_disk_serves_every_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.batches._MAX_KEPT_BYTES", 0)
    plain, encoded = epochs(data, None)
    assert encoded == 16
    cold = epochs(data, tmp_path / "cache", num_workers=2)
    assert torch.equal(cold[0], plain) and cold[1] == 8
    assert epochs(data, tmp_path / "cache", num_workers=2)[1] == 0


def test_a_folder_that_is_deleted_under_a_run_costs_time_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("finetune.data.batches._MAX_KEPT_BYTES", 0)
    plain, _ = epochs(data, None)
    epochs(data, tmp_path / "cache")
    batches = loader(data, tmp_path / "cache")
    first = [next(batches).codes for _ in range(2)]
    assert batches.num_encoded == 0
    shutil.rmtree(tmp_path / "cache")
    second = [next(batches).codes for _ in range(2)]
    assert torch.equal(torch.cat(first + second), plain) and batches.num_encoded == 8
    assert "what it held is made again" in caplog.text
    assert "cache cannot be written" in caplog.text and not (tmp_path / "cache").exists()


def test_evaluation_and_training_share_what_is_kept(data: Path, tmp_path: Path) -> None:
    epochs(data, tmp_path / "cache")
    args = DataArgs(
        eval_data=str(data / "all.jsonl"), cache_dir=str(tmp_path / "cache"), num_workers=0
    )
    passes = build_eval_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=2, device="cpu", store=open_store(args)
    )
    assert len(list(passes)) == 4 and passes.num_encoded == 0


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, warning, num_harmed",
    [
        (Path.unlink, "cannot be read (No such file or directory); what it held is made again", 8),
        (cut_off, "is too short", 1),
        (flip_a_bit, "has changed at byte", 1),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_codes_are_encoded_again(
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    harm: Any,
    warning: str,
    num_harmed: int,
    num_workers: int,
) -> None:
    plain, _ = epochs(data, tmp_path / "cache")
    (blobs,) = (tmp_path / "cache").glob("*.blobs")
    harm(blobs)
    codes, encoded = epochs(data, tmp_path / "cache", num_workers=num_workers)
    assert torch.equal(codes, plain) and encoded == num_harmed
    assert warning in caplog.text and "data.cache_dir" in caplog.text
    caplog.clear()
    codes, encoded = epochs(data, tmp_path / "cache")
    assert torch.equal(codes, plain) and encoded == 0
    assert "data.cache_dir" not in caplog.text


def test_a_cache_that_was_deleted_is_made_again(data: Path, tmp_path: Path) -> None:
    plain, _ = epochs(data, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    codes, encoded = epochs(data, tmp_path / "cache")
    assert torch.equal(codes, plain) and encoded == 8


def test_changed_audio_is_noticed_and_moved_audio_is_known(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = epochs(data, tmp_path / "cache")
    samples, rate = soundfile.read(data / "1.wav")
    soundfile.write(data / "1.wav", samples[::-1], rate)  # as long as before
    codes, encoded = epochs(data, tmp_path / "cache")
    assert encoded == 2 and not torch.equal(codes, plain)
    assert torch.equal(codes, epochs(data, None)[0])

    data.rename(tmp_path / "elsewhere")
    moved, encoded = epochs(tmp_path / "elsewhere", tmp_path / "cache")
    assert torch.equal(moved, codes) and encoded == 0
    forbid_audio(monkeypatch)
    assert epochs(tmp_path / "elsewhere", tmp_path / "cache")[1] == 0


def test_a_changed_transcript_changes_the_text_alone(data: Path, tmp_path: Path) -> None:
    plain, _ = epochs(data, tmp_path / "cache")
    for file in data.glob("*.json"):
        file.write_text('{"alignments": []}')
    codes, encoded = epochs(data, tmp_path / "cache")
    assert encoded == 0 and torch.equal(codes[:, 1:], plain[:, 1:])
    assert ((codes[:, 0] == 3) | (codes[:, 0] == -1)).all()


def another_mimi(change: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MIMI_CONFIG | {"transformer": MIMI_CONFIG["transformer"] | change}
        mimi = get_mimi(None, config, num_codebooks=8)
    mimi.load_state_dict(tiny_mimi().state_dict())
    return mimi


def test_codes_are_known_by_the_mimi_that_made_them(data: Path, tmp_path: Path) -> None:
    def codec_of(mimi: Any) -> Codec:
        return Codec(mimi, tiny_codec().tokenizer, moshi_codebooks=8, user_codebooks=8)

    epochs(data, tmp_path / "cache")
    same, other_window, other_weight = (
        another_mimi({}), another_mimi({"context": 49}), another_mimi({}),
    )  # fmt: skip
    next(other_weight.encoder.parameters()).data.view(-1)[0] += 1e-3
    assert epochs(data, tmp_path / "cache", own_codec=codec_of(same))[1] == 0
    assert epochs(data, tmp_path / "cache", own_codec=codec_of(other_window))[1] == 8
    assert epochs(data, tmp_path / "cache", own_codec=codec_of(other_weight))[1] == 8


def test_a_broken_segment_is_never_kept_on_disk(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = (data / "1.wav").read_bytes()
    first = loader(data, tmp_path / "cache", on_error="skip")
    (data / "1.wav").unlink()
    with caplog.at_level(logging.WARNING):
        assert sum(next(first).num_skipped for _ in range(4)) == 4  # two segments, two epochs
    first.close()
    (data / "1.wav").write_bytes(good)
    codes, encoded = epochs(data, tmp_path / "cache")
    assert encoded == 2 and torch.equal(codes, epochs(data, None)[0])


def test_long_segments_are_encoded_in_pieces_to_the_same_codes() -> None:
    """Stock streaming would not give them: attention sees 50 steps here, 2 s."""
    audio = torch.from_numpy(speech_like(8.0, 24000).T.copy())
    mimi = another_mimi({})
    for name, weight in mimi.encoder_transformer.named_parameters():
        if "layer_scale" in name:
            weight.data.fill_(1.0)  # for attention to matter
    mimi.encode = mimi._encode_to_unquantized_latent  # what codes are made of
    one_codec = Codec(mimi, tiny_codec().tokenizer, moshi_codebooks=8, user_codebooks=8)
    with torch.no_grad():
        whole = mimi.encode(audio[:, None])
        for piece_frames in (75, 47, 13):
            pieces = one_codec.encode_blocks(audio.split(piece_frames * 1920, 1), piece_frames)
            torch.testing.assert_close(torch.cat(list(pieces), -1), whole, rtol=1e-4, atol=1e-5)
        assert not mimi.is_streaming and not mimi.encoder.is_streaming
        with mimi.streaming(2):
            streamed = torch.cat([mimi.encode(p[:, None]) for p in audio.split(13 * 1920, 1)], -1)
    assert (streamed - whole).norm() > 1e-3 * whole.norm()


# --- the check at the start -----------------------------------------------------------------------


def test_unchanged_files_are_not_opened_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader(data, tmp_path / "cache")
    forbid_audio(monkeypatch)
    monkeypatch.setattr("finetune.data.layouts.jsonl.load_transcript", lambda path: 1 / 0)
    assert loader(data, tmp_path / "cache").num_segments == 8
    monkeypatch.undo()
    (data / "1.json").write_text("{")
    with pytest.raises(UserError, match=r"1 problem in the data(.|\n)*1\.json is not valid JSON"):
        loader(data, tmp_path / "cache")


def test_warnings_come_again_without_opening_a_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((data / "1.json").read_text())
    (data / "1.json").write_text(json.dumps(content | {"mood": "calm"}))
    loader(data, tmp_path / "cache")
    forbid_audio(monkeypatch)
    caplog.clear()
    assert loader(data, tmp_path / "cache").num_segments == 8
    assert "1.json holds what is not used here (mood)" in caplog.text


def test_ranks_share_the_check(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "cache")
    for rank in range(2):
        spec = str(data / "all.jsonl")
        sources.check_share_of_sources(
            spec, key="a", store=store, text=tiny_codec().text, rank=rank, world_size=2
        )
    forbid_audio(monkeypatch)
    assert loader(data, tmp_path / "cache").num_segments == 8


def test_ranks_that_check_at_the_same_time_see_each_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = DataArgs(train_data=str(data / "all.jsonl"), cache_dir=str(tmp_path / "cache"))
    stores = [open_store(args) for _ in range(2)]
    for rank, one in enumerate(stores):
        check_share(args, tiny_codec(), store=one, rank=rank, world_size=2, with_eval=False)
    forbid_audio(monkeypatch)
    for one in stores:
        found = build_train_loader(
            args, tiny_codec(), duration_sec=1.0, batch_size=4, seed=0, device="cpu", store=one
        )
        assert found.num_segments == 8


def test_a_run_that_fails_takes_no_folder_from_one_that_shares_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shared/codes"
    others: list[Store] = []

    def fails() -> None:
        Store(folder)
        others.append(Store(folder))
        raise UserError("no")

    assert run(fails) == 1 and not folder.exists()
    others[0].append(b"k" * 16, b"codes")
    blob = Store(folder).find(b"k" * 16)
    assert blob is not None and blob.read() == b"codes"
    assert not caplog.records
