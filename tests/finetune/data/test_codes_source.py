"""Codes instead of audio: an `.npz` trains as the recordings that it was made from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import tiny_codec, write_dataset
from recordings_tools import call
from training_tools import logged, train

from finetune.config import DataArgs, load_config
from finetune.data import build_train_loader, check_recordings, open_store
from finetune.encode import encode_data
from finetune.errors import UserError
from finetune.evaluation.codes import encode_to_file

DURATIONS_SEC = [2.0, 2.0, 1.2]


def loaded(path: Path, **options: Any) -> torch.Tensor:
    """All segments, in order: `[segments, 17, 25]`."""
    args = DataArgs(train_data=str(path), num_workers=0, **options)
    loader = build_train_loader(
        args, tiny_codec(), duration_sec=2.0, batch_size=1, seed=0, device="cpu", store=None
    )
    codes = torch.cat([next(loader).codes for _ in range(loader.num_segments)])
    loader.close()
    return codes


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "audio", DURATIONS_SEC)


@pytest.fixture
def codes(audio: Path) -> list[Any]:
    """What the recordings are, by segment, without padding: `[17, T]` each."""
    return [row[:, row[0] >= 0].numpy() for row in loaded(audio)]


def save(path: Path, arrays: list[Any], dtype: Any = np.int16) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{str(index): array.astype(dtype) for index, array in enumerate(arrays)})
    return path


@pytest.mark.parametrize("with_text", [True, False])
def test_it_is_what_the_audio_is(
    tmp_path: Path, audio: Path, codes: list[Any], with_text: bool
) -> None:
    path = save(tmp_path / "codes/all.npz", codes if with_text else [c[1:] for c in codes])
    if not with_text:
        for index in range(3):
            words = (tmp_path / f"audio/{index}.json").read_text()
            (path.parent / f"{index}.json").write_text(words)
    assert torch.equal(loaded(path), loaded(audio))
    assert torch.equal(loaded(path.parent), loaded(audio))  # a folder of such files
    turned = loaded(path, main_channel="right")
    assert torch.equal(turned, loaded(audio, main_channel="right"))


def test_threads_read_side_by_side_without_pythons_parser(
    tmp_path: Path, codes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's parser fails where threads use it at one time (CPython issue 106905)."""
    path = save(tmp_path / "all.npz", [np.asfortranarray(codes[0]), codes[1]])

    def parse(*_: Any, **__: Any) -> None:
        raise AssertionError("Python's parser was used")

    with monkeypatch.context() as patched:  # pytest parses too
        patched.setattr("ast.parse", parse)
        recordings, problems = check_recordings(str(path), key="data.train_data")
        read = loaded(path)
    assert len(recordings) == 2 and not problems
    assert np.array_equal(read[0, :, : codes[0].shape[1]].numpy(), codes[0])


def test_both_sides_need_a_transcript(tmp_path: Path, codes: list[Any]) -> None:
    path = save(tmp_path / "codes/all.npz", codes)
    with pytest.raises(UserError, match="hold the text of one side alone"):
        loaded(path, swap_channels=True)
    save(path, [c[1:] for c in codes])
    for index in range(3):
        words = [["fine", [0.2, 0.4], "SPEAKER_USER"], ["you", [0.8, 0.9], "SPEAKER_MAIN"]]
        (path.parent / f"{index}.json").write_text(json.dumps({"alignments": words}))
    both = loaded(path, swap_channels=True)
    assert len(both) == 6 and torch.equal(both[3:, 1:9], both[:3, 9:])
    codec = tiny_codec()
    assert [codec.detokenize(both[row, 0]) for row in (0, 3)] == ["you", "fine"]


def test_a_run_encoding_and_evaluation_read_it(
    config: Path, tmp_path: Path, audio: Path, codes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "codes/all.npz", codes)
    for name, data in (("audio", audio), ("codes", path)):
        train(config, tmp_path / f"run {name}", {"data.train_data": data, "data.num_workers": 1})
    assert logged(tmp_path / "run codes") == logged(tmp_path / "run audio")
    assert set(logged(tmp_path / "run codes", "encoded_segments")) == {0}
    encode_data(load_config(config, {"data.train_data": path, "data.cache_dir": tmp_path / "c"}))
    assert "0 of 3 segments are to be encoded" in capsys.readouterr().out
    recordings, _ = check_recordings(str(path), key="data")
    found = encode_to_file(tiny_codec(), recordings[2], tmp_path / "found")
    assert np.array_equal(found.read(0, 15), codes[2])


BROKEN: dict[str, Any] = {
    "cannot be read as .npz": lambda path, codes: path.write_bytes(b"hello"),
    "hold numbers below 0": lambda path, codes: save(path, [codes[0] - 40]),
    "go up to 99, and Mimi has 32": lambda path, codes: save(path, [np.full((17, 25), 99)]),
    "are of 4 codebooks a channel": lambda path, codes: save(path, [codes[0][:9]]),
    "tokens up to 5000": lambda path, codes: save(path, [np.vstack([codes[0][:1] * 0 + 5000,
                                                                    codes[0][1:]])]),
    "codes have shape [17]": lambda path, codes: save(path, [np.zeros(17)]),
    "of float32: expected whole numbers": lambda path, codes: save(path, codes, np.float32),
    "0.json is missing": lambda path, codes: save(path, [codes[0][1:]]),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_wrong_is_named(tmp_path: Path, codes: list[Any], message: str) -> None:
    path = save(tmp_path / "codes/all.npz", codes)
    BROKEN[message](path, codes)
    with pytest.raises(UserError) as error:
        loaded(path)
    assert message in str(error.value) and str(path) in str(error.value)


OTHERS = [
    "go up to 99, and Mimi has 32",
    "are of 4 codebooks a channel, and the model reads 8",
    "tokens up to 5000, and the tokenizer has",
]
"""Codes that are sound, and not those of this model."""


def of_model(config: Path, folder: Path, **shape: int) -> str:
    """Return the option that gives a run's model another shape."""
    changed = json.loads((config.parent / "model/config.json").read_text()) | shape
    (folder / "config.json").write_text(json.dumps(changed))
    return f"--moshi_paths.config_path={folder}/config.json"


@pytest.mark.parametrize("message", OTHERS)
def test_codes_of_another_model_are_found_ahead_of_the_run(
    config: Path,
    tmp_path: Path,
    codes: list[Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By `data check` and as the data are loaded, not when a run comes to them."""
    path = save(tmp_path / "codes/all.npz", codes)
    shape = of_model(config, tmp_path, n_q=16, dep_q=8)
    check = ("data", "check", config, shape, f"--data.train_data={path}", "--data.eval_data=")
    kept = ("--fast", "--cache", tmp_path / "kept", "--workers=1")
    assert call(*check, *kept) == 0
    assert "note: codes" not in capsys.readouterr().out
    next(BROKEN[begun] for begun in BROKEN if message.startswith(begun))(path, codes)
    assert call(*check, *kept) == 1
    said = capsys.readouterr().out
    assert f"all.npz/0: {'the text of ' if 'tokens' in message else ''}codes {path}/0 " in said
    assert message in said and "[other-codes]" in said
    args = DataArgs(train_data=str(path), num_workers=0, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        build_train_loader(
            args,
            tiny_codec(),
            duration_sec=2.0,
            batch_size=1,
            seed=0,
            device="cpu",
            store=open_store(args),
        )


def test_codes_that_were_good_for_one_model_are_looked_at_again_for_another(
    config: Path, tmp_path: Path, codes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "codes/all.npz", codes)
    check = ("data", "check", config, f"--data.train_data={path}", "--data.eval_data=")
    options = ("--cache", tmp_path / "kept", "--workers=1")
    assert call(*check, *options) == 0, "of more codebooks than this model reads"
    assert call(*check, of_model(config, tmp_path, n_q=18, dep_q=8), *options) == 1
    assert "of 8 codebooks a channel, and the model reads 10" in capsys.readouterr().out


def test_without_a_model_nothing_is_said_of_its_codebooks(
    tmp_path: Path, codes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "codes/all.npz", [codes[0][:9]])
    assert call("data", "check", path, "--workers=1") == 0
    assert "note: codes were not compared with a model: give" in capsys.readouterr().out


def test_nothing_in_it_is_run(tmp_path: Path) -> None:
    path = tmp_path / "all.npz"
    np.savez(path, a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(UserError, match=r"codes have shape \[1\] of object"):
        loaded(path)


def changed_entry(path: Path, place: int, value: int) -> None:
    """Change a field of two bytes of the first entry in the archive's directory."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + place
    content[at : at + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)


def changed_values(path: Path) -> None:
    """Damage what is packed: after the name and the first block, or as its first byte."""
    content = bytearray(path.read_bytes())
    at = content.index(b"0.npy") + len(b"0.npy") + 20  # behind the field for large files
    content[at] = 0xFF  # no kind of block
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "it is damaged: Error -3": changed_values,
    "was not written by numpy: That compression method": lambda p: changed_entry(p, 10, 99),
    "'0.npy' is encrypted": lambda path: changed_entry(path, 8, 1),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_archive_is_skipped(
    tmp_path: Path, codes: list[Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "codes/good.npz", codes[1:2])
    bad = tmp_path / "codes/bad.npz"
    arrays: dict[str, Any] = {"0": codes[0].astype(np.int16)}
    np.savez_compressed(bad, **arrays)
    DAMAGES[message](bad)
    assert loaded(bad.parent, on_error="skip").shape[0] == 1
    assert f"{bad} cannot be read as .npz" in caplog.text and message in caplog.text


def test_an_archive_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    values: Any = np.random.default_rng(0).integers(1, 30, (17, 2000)).astype(np.int16)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{"0": values})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = np.random.default_rng(1).bytes(5000)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        loaded(path)
    assert f"codes {path}/0 cannot be read (it is damaged: " in str(error.value)


def test_what_is_beside_codes_in_a_file_is_named_alone(tmp_path: Path, codes: list[Any]) -> None:
    """An array whose values have several parts, which numpy writes as well."""
    times = np.zeros(3, dtype=[("start", "f8"), ("end", "f8")])
    np.savez(tmp_path / "all.npz", codes=codes[0].astype(np.int16), times=times)
    recordings, problems = check_recordings(str(tmp_path / "all.npz"), key="data.train_data")
    assert [recording.title[-5:] for recording in recordings] == ["codes"]
    (problem,) = problems
    assert "all.npz/times: codes have shape [3]" in problem and "expected whole numbers" in problem


@pytest.mark.parametrize("descr", [b"'<q8'", b"'(1,2"])
def test_a_type_that_is_none_is_damage(tmp_path: Path, codes: list[Any], descr: bytes) -> None:
    path = save(tmp_path / "all.npz", codes[:1])
    damaged = path.read_bytes().replace(b"'<i2'", descr.ljust(5))
    path.write_bytes(damaged)
    assert b"<i2" not in damaged
    recordings, problems = check_recordings(str(path), key="data.train_data")
    assert not recordings and "all.npz" in problems[0]


@pytest.mark.parametrize("shape", [(17, 0), (200, 17)])
def test_codes_without_frames_or_turned_round_are_named(
    tmp_path: Path, codes: list[Any], shape: tuple[int, int]
) -> None:
    path = save(tmp_path / "all.npz", [codes[0], np.zeros(shape, int)])
    recordings, problems = check_recordings(str(path), key="data.train_data")
    assert len(recordings) == 1
    assert "all.npz/1: codes have shape" in problems[0] and "[streams, frames]" in problems[0]


def test_a_file_without_arrays_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz")
    _, problems = check_recordings(str(tmp_path / "all.npz"), key="data.train_data")
    assert problems == [problems[0]] and "all.npz holds no arrays: expected" in problems[0]
