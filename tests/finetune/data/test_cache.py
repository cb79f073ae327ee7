"""Codes on disk: encoded once, found again, and never trusted when they are damaged."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from data_tools import MIMI_CONFIG, speech_like, tiny_codec, tiny_mimi, write_dataset
from moshi.models.loaders import get_mimi
from training_tools import REPOSITORY, logged, train

from finetune.config import DataArgs, load_config
from finetune.data import (
    Codec,
    build_eval_loader,
    build_train_loader,
    check_share,
    open_store,
    sources,
    store,
)
from finetune.data.cache import CodeCache
from finetune.data.loader import TrainLoader
from finetune.data.store import Store, _Writer, make_key
from finetune.encode import encode_data
from finetune.errors import UserError

KEYS = [make_key("key", number) for number in range(4)]


# --- the store ------------------------------------------------------------------------------------


def filled(folder: Path, *numbers: Any) -> Store:
    store = Store(folder)
    for number in numbers:
        store.put(KEYS[number], bytes([number]) * 16)
        store.append(make_key("blob", number), b"blob" * number)
    return store


def blobs(store: Store) -> dict[int, bytes]:
    found = {n: store.find(make_key("blob", n)) for n in range(4)}
    return {n: blob.read() for n, blob in found.items() if blob is not None}


def test_what_is_kept_is_there_for_others_and_later(tmp_path: Path) -> None:
    first, second = filled(tmp_path, 1), filled(tmp_path, 2, 3)
    assert blobs(first) == {1: b"blob"}  # it has not looked since
    assert blobs(second) == {1: b"blob", 2: b"blobblob", 3: b"blobblobblob"}
    later = Store(tmp_path)
    assert blobs(later) == blobs(second)
    assert later.get(KEYS[3]) == b"\3" * 16 and later.get(KEYS[0]) is None


def test_others_are_seen_without_opening_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.store._REFRESH_SEC", 0.0)
    reader, writer = Store(tmp_path), Store(tmp_path)
    for number in (1, 2):
        writer.append(make_key("blob", number), b"blob" * number)
        reader.refresh()
        assert len(blobs(reader)) == number


@pytest.mark.parametrize("cut", range(1, 36, 5))
def test_an_entry_that_was_being_written_does_not_count(tmp_path: Path, cut: int) -> None:
    filled(tmp_path, 1, 2)
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(index.read_bytes()[:-cut])
    assert blobs(Store(tmp_path)) == {1: b"blob"}


def test_a_damaged_entry_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 1, 2)
    (index,) = tmp_path.glob("*.index")
    content = bytearray(index.read_bytes())
    content[1 * 36 + 20] ^= 1  # the place of the first blob
    index.write_bytes(content)
    assert blobs(Store(tmp_path)) == {2: b"blobblob"}
    assert "is damaged; what 1 of its entries held" in caplog.text


def test_an_end_that_looks_like_zeros_for_a_moment_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As what was just appended may on NFS."""
    filled(tmp_path, 1, 2, 3)
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    index.write_bytes(whole[: 3 * 36] + bytes(3 * 36))
    reader = Store(tmp_path)
    assert blobs(reader) == {1: b"blob"} and reader.get(KEYS[2]) == b"\2" * 16
    index.write_bytes(whole)
    reader.refresh(at_once=True)
    assert list(blobs(reader)) == [1, 2, 3]
    assert not caplog.text


KILLED_WHILE_WRITING = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
# The file alone: the package would import torch.
spec = spec_from_file_location("store", "finetune/data/store.py")
module = module_from_spec(spec)
sys.modules["store"] = module
spec.loader.exec_module(module)
Store, make_key = module.Store, module.make_key
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10**9):
    store.append(make_key(number), number.to_bytes(8, "little") * 5000)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    while sum(path.stat().st_size for path in tmp_path.iterdir()) < 3_000_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path)
    number = 0
    while blob := store.find(make_key(number)):
        assert blob.read() == number.to_bytes(8, "little") * 5000
        number += 1
    assert number >= 70
    store.append(KEYS[0], b"goes on")
    last = Store(tmp_path).find(KEYS[0])
    assert last is not None and last.read() == b"goes on"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, 1)
    assert store._own is not None
    store._own.blobs = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for number in (2, 3):
        store.append(make_key("blob", number), b"blob" * number)
        store.put(KEYS[number], b"\0" * 16)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert blobs(store) == blobs(Store(tmp_path)) == {1: b"blob"}
    store._own.blobs.close()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file/x cannot be used"):
        Store(tmp_path / "file/x")


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


# --- whole runs -----------------------------------------------------------------------------------


def test_the_cache_changes_no_loss(config: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 8,
        "do_eval": True,
    }  # two epochs of 7 segments, and evaluation
    cached: dict[str, Any] = {**options, "data.cache_dir": tmp_path / "cache"}
    train(config, tmp_path / "plain", options)
    train(config, tmp_path / "in turn", {**options, "data.prefetch_steps": 0})
    train(config, tmp_path / "cold", cached)
    train(config, tmp_path / "warm", {**cached, "data.num_workers": 1})
    (blobs,) = (tmp_path / "cache").glob("*.blobs")
    flip_a_bit(blobs)
    train(config, tmp_path / "damaged", cached)
    for kind in ("train", "eval"):
        expected = logged(tmp_path / "plain", kind=kind)
        for run in ("in turn", "cold", "warm", "damaged"):
            assert logged(tmp_path / run, kind=kind) == expected, run
    encoded = logged(tmp_path / "cold", "encoded_segments")
    assert encoded[0] == 3 + 2 and encoded[-1] == 3 + 7  # 3 to evaluate on, 7 to train on
    assert set(logged(tmp_path / "warm", "encoded_segments")) == {0}
    assert logged(tmp_path / "damaged", "encoded_segments")[-1] == 1


def test_encoding_ahead_goes_on_where_it_was_stopped(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides: dict[str, Any] = {"data.cache_dir": tmp_path / "cache", "do_eval": True}
    keep, kept = CodeCache.keep, []

    def keep_and_stop(self: Any, *args: Any) -> None:
        keep(self, *args)
        kept.append(args)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(CodeCache, "keep", keep_and_stop)
    with pytest.raises(KeyboardInterrupt):
        encode_data(load_config(config, overrides))
    assert "10 of 10 segments are to be encoded" in capsys.readouterr().out
    for there in (3, 10):
        encode_data(load_config(config, overrides))
        assert f"encoded {10 - there} segments" in (out := capsys.readouterr().out)
        assert f"{there} were there before" in out
    train(config, tmp_path / "run", {**overrides, "max_steps": 8})
    assert set(logged(tmp_path / "run", "encoded_segments")) == {0}


def test_encoding_ahead_needs_a_folder(config: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir is not set"):
        encode_data(load_config(config))


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(bytes(10**5))])
def test_encoding_ahead_makes_damaged_codes_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any
) -> None:
    options = load_config(config, {"data.cache_dir": tmp_path / "cache"})
    encode_data(options)
    (blobs,) = (tmp_path / "cache").glob("*.blobs")
    harm(blobs)
    capsys.readouterr()
    for num_missing in (7, 0):
        encode_data(options)
        assert f"{num_missing} of 7 segments are to be encoded" in capsys.readouterr().out


def test_encoding_ahead_onto_a_disk_that_runs_full(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def write_while_there_is_room(file: Any, content: Any) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        WRITE(file, content)
        if file.name.endswith(".blobs"):
            written.append(content)

    WRITE = store._write
    monkeypatch.setattr(store, "_write", write_while_there_is_room)
    options = load_config(config, {"data.cache_dir": tmp_path / "cache"})
    message = r"cannot be written \(No space left on device\); 2 segments were kept"
    with pytest.raises(UserError, match=message):
        encode_data(options)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.undo()
    encode_data(options)


def test_encoding_ahead_into_a_folder_that_cannot_be_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, kind: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_Writer, "open", refuse)
    with pytest.raises(UserError, match=r"Permission denied\); 0 segments were kept"):
        encode_data(load_config(config, {"data.cache_dir": tmp_path / "cache"}))


def test_encoding_ahead_with_a_config_of_another_model(config: Path, tmp_path: Path) -> None:
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    entries = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(entries | {"num_heads": "many"}))
    overrides: dict[str, Any] = {
        "data.cache_dir": tmp_path / "cache",
        "moshi_paths.hf_repo_id": str(model),
    }
    with pytest.raises(UserError, match=r"config_path: the config\.json"):
        encode_data(load_config(config, overrides))


def test_a_run_opens_the_folder_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    init = Store.__init__

    def counted(*args: Any) -> None:
        opened.append(args)
        init(*args)

    monkeypatch.setattr(Store, "__init__", counted)
    options: dict[str, Any] = {
        "data.cache_dir": tmp_path / "cache",
        "do_eval": True,
        "max_steps": 8,
    }
    train(config, tmp_path / "run", options)
    assert len(opened) == 1 and len(list((tmp_path / "cache").iterdir())) == 2
