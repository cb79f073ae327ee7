"""The cache of codes in whole runs, and `moshi-ttt encode`, which fills it ahead of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from recordings_tools import call
from test_cache import flip_a_bit
from training_tools import logged, run_ranks, train

from finetune.config import load_config
from finetune.data import store
from finetune.data.cache import CodeCache
from finetune.data.store import Store, _Writer
from finetune.encode import encode_data
from finetune.errors import UserError


def test_the_cache_changes_no_loss(config: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 8,
        "do_eval": True,
        "data.cache_dir": None,
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


def test_copies_of_recordings_are_counted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty were to be encoded, sixteen were, and nothing was said of the others."""
    data = Path(str(load_config(config).data.train_data))
    folder = shutil.copytree(data.parent, tmp_path / "copies")
    both = {"data.train_data": f"{data},{folder / data.name}", "do_eval": False}
    encode_data(load_config(config, {**both, "data.cache_dir": tmp_path / "cache"}))
    said = capsys.readouterr().out
    assert "14 of 14 segments are to be encoded" in said and "encoded 7 segments" in said
    assert "0 were there before, 7 had codes by then, as copies of others have" in said


UNEQUAL = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from finetune import encode
from finetune.config import load_config
from finetune.distributed import join_world
config, folder = map(Path, sys.argv[1:])
rank = int(os.environ["RANK"])
join_world.__kwdefaults__["timeout"] = timedelta(seconds=3)  # 15 minutes, in truth
encode_share = encode._run
def encode_late(*args):
    time.sleep(4 * rank)
    encode_share(*args)
encode._run = encode_late
(folder / f"here {rank}").touch()
while not (folder / f"here {1 - rank}").exists():  # to start is not what takes long
    time.sleep(0.01)
encode.encode_data(load_config(config, {"data.cache_dir": folder / "cache"}))
print(f"rank {rank} is done", flush=True)
"""


def test_a_process_waits_for_those_that_have_more_to_encode(config: Path, tmp_path: Path) -> None:
    said = run_ranks(2, UNEQUAL, config, tmp_path)
    assert "rank 0 is done" in said and "rank 1 is done" in said


def test_encoding_ahead_needs_a_folder(config: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir is not set"):
        encode_data(load_config(config, {"data.cache_dir": None}))


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
    with pytest.raises(UserError) as caught:
        encode_data(options)
    assert str(caught.value) == (
        f"data.cache_dir: {tmp_path / 'cache'} cannot be written (No space left on device); "
        "2 segments were kept. Make room, or name a folder that can be written, and start again: "
        "what was kept stays."
    )
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


@pytest.mark.parametrize("key", ["init_from", "moshi_path"])
def test_encoding_ahead_needs_no_weights_of_the_language_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """While an earlier stage still trains, or where the large file is on another machine."""
    files = shutil.ignore_patterns("model.safetensors")
    model = shutil.copytree(config.parent / "model", tmp_path / "model", ignore=files)
    weights = f"--moshi_paths.{key}={tmp_path}/runs/one/checkpoints/checkpoint_000100"
    repo = f"--moshi_paths.hf_repo_id={model}"
    words = [config, repo, weights, f"--data.cache_dir={tmp_path / 'cache'}"]
    assert call("data", "encode", *words) == 0
    assert "encoded 7 segments" in capsys.readouterr().out
    assert call("train", *words) == 1  # which reads them
    assert f"moshi_paths.{key}: " in capsys.readouterr().err


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
