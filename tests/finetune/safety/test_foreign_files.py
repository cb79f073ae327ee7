"""Files from somebody else: nothing in them is run, and no name in them leads elsewhere."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from data_tools import write_jsonl, write_recording
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata
from training_tools import LORA, checkpoint, logged, sign, train, trainer

import finetune.data.codec
from finetune.checkpoint import manifest
from finetune.checkpoint.tensor_reader import TensorReader
from finetune.cli import generate as generate_command
from finetune.cli import run
from finetune.data.audio import inspect_audio, read_audio
from finetune.data.codec import Codec
from finetune.data.problems import FileProblem
from finetune.data.sources import load_sources
from finetune.data.transcripts import read_transcript
from finetune.errors import UserError
from finetune.evaluation.tasks.pairs.score import read_pairs
from finetune.inference import load_for_inference
from finetune.model import find_checkpoint
from finetune.safety import stays_inside, with_nan, without_nan


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Runs:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(config, run_dir, LORA | {"ckpt_freq": 2})
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# --- pickles --------------------------------------------------------------------------------------


def _runs(found: Any, mark: Path) -> bytes:
    return pickle.dumps(Runs(mark))


def _runs_inside(found: Any, mark: Path) -> bytes:
    found.planner_data = Runs(mark)
    return pickle.dumps(found)


def _values_that_are_unpickled_later(found: Any, mark: Path) -> bytes:
    for name in list(found.state_dict_metadata):
        found.state_dict_metadata[name] = metadata.BytesStorageMetadata()
    return pickle.dumps(found)


def _a_file_elsewhere(found: Any, mark: Path) -> bytes:
    for place in found.storage_data.values():
        place.relative_path = "../../../../outside"
    return pickle.dumps(found)


def _another_way_of_storing(found: Any, mark: Path) -> bytes:
    for place in found.storage_data.values():
        place.transform_descriptors = ["zstd"]
    return pickle.dumps(found)


def _a_function_of_torch(found: Any, mark: Path) -> bytes:
    found.planner_data = torch.hub.load
    return pickle.dumps(found)


METADATA = [
    _runs, _runs_inside, _values_that_are_unpickled_later, _a_file_elsewhere,
    _another_way_of_storing, _a_function_of_torch, lambda found, mark: b"no pickle",
    lambda found, mark: b"", lambda found, mark: pickle.dumps([1]),
]  # fmt: skip


@pytest.mark.parametrize("attack", METADATA)
def test_resuming_runs_nothing_of_a_checkpoint(
    config: Path, run_dir: Path, tmp_path: Path, attack: Callable[..., Any]
) -> None:
    mark = tmp_path / "owned"
    saved = checkpoint(run_dir, 4)
    file = saved / "resume/.metadata"
    found = TensorReader(saved / "resume").read_metadata()
    found.storage_meta = None
    file.write_bytes(attack(found, mark))
    sign(saved)
    with pytest.raises(UserError, match=r"_000004/resume/\.metadata does not say") as error:
        trainer(config, run_dir, LORA | {"resume": True})
    assert str(error.value).startswith(str(saved)) and "configuration" not in str(error.value)
    assert f"Delete {saved}" in str(error.value) and f"init_from: {saved}" in str(error.value)
    assert not mark.exists()


def test_a_resume_file_is_no_pickle_of_anything(
    config: Path, run_dir: Path, tmp_path: Path
) -> None:
    saved = checkpoint(run_dir, 4)
    with zipfile.ZipFile(saved / "resume.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved / "resume.pt", "w") as archive:
        for name, content in parts.items():
            evil = pickle.dumps(Runs(tmp_path / "owned"))
            archive.writestr(name, evil if name.endswith("data.pkl") else content)
    sign(saved)
    with pytest.raises(UserError, match=r"cannot read .*resume\.pt"):
        trainer(config, run_dir, LORA | {"resume": True})
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "key", ["moshi_path", "mimi_path", "tokenizer_path", "init_from", "generate"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_from_safetensors_alone(
    config: Path, run_dir: Path, tmp_path: Path, key: str, suffix: str
) -> None:
    mark, evil = tmp_path / "owned", tmp_path / f"evil{suffix}"
    buffer = io.BytesIO()
    torch.save({"model": Runs(mark)}, buffer)
    evil.write_bytes(buffer.getvalue())
    overrides: dict[str, Any] = {f"moshi_paths.{key}": evil}
    if key in ("init_from", "generate"):
        file = checkpoint(run_dir, 4) / "consolidated/lora.safetensors"
        file.write_bytes(evil.read_bytes())
        overrides = LORA | {"moshi_paths.init_from": checkpoint(run_dir, 4)}
    with pytest.raises(UserError, match="lora" if key in ("init_from", "generate") else key):
        if key == "generate":
            load_for_inference(checkpoint(run_dir, 4), "cpu")
        trainer(config, tmp_path / "new", overrides)
    assert not mark.exists()


# --- names ----------------------------------------------------------------------------------------

OUTSIDE = ["../secret", "/etc/hostname", "a/../../secret", "", "..", "a\0b", "C:\\secret"]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_no_name_leads_out_of_its_folder(
    config: Path, run_dir: Path, tmp_path: Path, name: str
) -> None:
    assert not stays_inside(name)
    saved = checkpoint(run_dir, 4)
    entries = manifest.read(saved)
    (saved / "manifest.json").write_text(json.dumps(entries | {name: {"bytes": 1, "sha256": ""}}))
    assert not manifest.is_whole(saved)
    with pytest.raises(UserError, match=r"manifest\.json .* is not in its folder"):
        trainer(config, run_dir, LORA | {"resume": True})
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    change_config(model, mimi_name=name)
    with pytest.raises(UserError, match=r"moshi_paths\.mimi_path: .* is not in its folder"):
        trainer(config, tmp_path / "new", {"moshi_paths.hf_repo_id": model})


@pytest.mark.parametrize("name", ["../a.wav", "x/../../a.wav", "\0", "\ud800.wav", "a" * 5000])
def test_recordings_are_in_the_folder_of_their_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    write_recording(tmp_path, "a.wav", 2.0)
    lines = write_jsonl(tmp_path / "data/all.jsonl", [{"path": name, "duration": 2.0}])
    with pytest.raises(UserError, match=r"all\.jsonl:1: the path") as error:
        load_sources(str(lines), key="data.train_data", num_frames=25, on_error="raise")
    str(error.value).encode()  # can be printed
    assert len(str(error.value)) < 500
    pairs = write_jsonl(tmp_path / "data/pairs.jsonl", [{"good": name, "bad": "b.wav"}])
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: "):
        read_pairs(pairs)
    good = write_jsonl(tmp_path / "all.jsonl", [{"path": str(tmp_path / "a.wav"), "duration": 2.0}])
    load_sources(str(good), key="data.train_data", num_frames=25, on_error="raise")


# --- what JSON can be -----------------------------------------------------------------------------

ODD: dict[str, Any] = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "a list": "[1, 2]",
    "binary": "\udcff\udcfe",
    "digits": '{"alignments": ' + "9" * 5000 + "}",
    "null": "null",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_json_of_another_kind_is_one_message(config: Path, tmp_path: Path, text: Any) -> None:
    content = text.encode(errors="surrogateescape")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileProblem, match=r"a\.json"):
        read_transcript(tmp_path / "a.json")
    (tmp_path / "all.jsonl").write_bytes(content + b"\n")
    with pytest.raises(UserError, match=r"all\.jsonl"):
        load_sources(str(tmp_path / "all.jsonl"), key="k", num_frames=25, on_error="raise")
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    (model / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config"):
        trainer(config, tmp_path / "new", {"moshi_paths.hf_repo_id": model})


def test_numbers_that_are_none_survive_json() -> None:
    record: dict[str, Any] = {
        "a": [1.5, float("nan")],
        "b": {"c": float("inf")},
        "d": -float("inf"),
        "e": "x",
    }
    text = json.dumps(without_nan(record, as_text=True), allow_nan=False)
    assert repr(with_nan(json.loads(text))) == repr(record)
    assert without_nan(record) == {"a": [1.5, None], "b": {"c": None}, "d": None, "e": "x"}


# --- recordings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [44101, 23999, 2**31 - 1])
def test_a_rate_without_a_common_divisor_is_one_message(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((100, 2)), rate_hz)
    with pytest.raises(FileProblem, match=f"has {rate_hz} samples a second.*ffmpeg"):
        inspect_audio(tmp_path / "a.wav")
    with pytest.raises(FileProblem, match="samples a second"):
        read_audio(tmp_path / "a.wav", 0, 10, 24000)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000])
def test_usual_rates_are_read(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((rate_hz // 10, 2)), rate_hz)
    num_samples = round(inspect_audio(tmp_path / "a.wav").duration_sec * 24000)
    assert abs(read_audio(tmp_path / "a.wav", 0, num_samples, 24000).shape[1] - 2400) <= 3


def test_hours_that_are_not_there_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (4800, 2)), 24000)
    content = bytearray(path.read_bytes())
    num_samples = 24000 * 3600 * 40
    content[21] = content[21] & 0xF0 | num_samples >> 32
    content[22:26] = (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(FileProblem, match="is truncated, its header promises more"):
        inspect_audio(path)


# --- models and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dep_q": 8}, "predicts all codebooks that it reads"),
        ({"dep_q": 0}, "predicts no audio"),
        ({"conditioners": {"speaker": {"type": "tensor"}}}, r"conditioners \(speaker\)"),
    ],
    ids=str,
)
def test_models_that_are_not_trained_right_are_refused(
    config: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    change_config(model, **changes)
    with pytest.raises(UserError, match=f"moshi_paths: .*{named}"):
        trainer(config, tmp_path / "run", {"moshi_paths.hf_repo_id": model})
    with pytest.raises(UserError, match=named):
        load_for_inference(model, "cpu")


def test_conditioners_that_are_none_are_none(config: Path, tmp_path: Path) -> None:
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    change_config(model, conditioners={})
    train(config, tmp_path / "run", {"moshi_paths.hf_repo_id": model, "max_steps": 1})


@pytest.mark.parametrize(
    ("content", "named"),
    [({}, "lacks dim"), ({"architectures": ["MoshiForConditionalGeneration"]}, "transformers")],
)
def test_a_config_without_a_shape_says_what_to_set(
    config: Path, tmp_path: Path, content: Any, named: str
) -> None:
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    names = {
        k: v for k, v in json.loads((model / "config.json").read_text()).items() if "name" in k
    }
    (model / "config.json").write_text(json.dumps(names | content))
    with pytest.raises(UserError, match=rf"{named}.* Set config_path to one that has dim"):
        trainer(config, tmp_path / "run", {"moshi_paths.hf_repo_id": model})


@pytest.mark.parametrize("level", ["", "checkpoints", "checkpoints/checkpoint_000004/consolidated"])
def test_a_checkpoint_at_the_wrong_level_is_named(run_dir: Path, level: str) -> None:
    with pytest.raises(
        UserError,
        match=f"[dD]id you mean {checkpoint(run_dir, 4)}",
    ):
        load_for_inference(run_dir / level, "cpu")


def test_auto_continues_from_the_newest_whole_checkpoint(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(run_dir, 4) / "consolidated/lora.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    overrides = LORA | {"ckpt_freq": 2, "max_steps": 6}
    with pytest.raises(UserError, match=r"lora\.safetensors is damaged.* Delete .*_000004"):
        trainer(config, run_dir, overrides | {"resume": True})
    before = logged(run_dir)
    assert train(config, run_dir, overrides | {"resume": "auto"}).step == 6
    output = capsys.readouterr().out
    assert "lora.safetensors is damaged" in output and "trying the one before" in output
    assert f"resuming {checkpoint(run_dir, 2)} after step 2" in output
    assert logged(run_dir)[:2] == before[:2]
    assert checkpoint(run_dir, 4).is_dir() and checkpoint(run_dir, 6).is_dir()
    assert (run_dir / "checkpoints/checkpoint_000004.damaged").is_dir()


def test_auto_stops_where_no_checkpoint_is_whole(config: Path, run_dir: Path) -> None:
    for step in (2, 4):
        (checkpoint(run_dir, step) / "info.json").write_text("?")
    with pytest.raises(UserError, match=r"info\.json is damaged"):
        trainer(config, run_dir, LORA | {"resume": "auto"})


# --- generating -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec(config: Path) -> Codec:
    from finetune.config import load_config
    from finetune.model import build_codec, plan_model

    args = load_config(config)
    info = find_checkpoint(args.moshi_paths)
    return build_codec(info, plan_model(args, info), "cpu")


@pytest.mark.parametrize("piece_frames", [1, 13, 100])
def test_decoding_in_pieces_is_decoding_at_once(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, piece_frames: int
) -> None:
    codes = torch.randint(0, 20, (2, 4, 230), generator=torch.Generator().manual_seed(0))
    at_once = codec.decode(codes)
    monkeypatch.setattr(finetune.data.codec, "_PIECE_FRAMES", piece_frames)
    in_pieces = codec.decode(codes)
    torch.testing.assert_close(in_pieces, at_once, rtol=0, atol=1e-5 * at_once.abs().max().item())


def test_weights_that_are_no_numbers_are_said(
    config: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(run_dir, 4) / "consolidated/lora.safetensors"
    save_file({k: torch.full_like(v, float("nan")) for k, v in load_file(file).items()}, file)
    sign(checkpoint(run_dir, 4))
    out = tmp_path / "out.wav"
    options: dict[str, Any] = {
        "checkpoint": str(checkpoint(run_dir, 4)),
        "out": str(out),
        "prompt_sec": "0.5",
    }
    options["audio"] = str(config.parent / "eval/0.wav")
    assert run(lambda: generate_command(**options)) == 1
    assert "NaN or infinite" in capsys.readouterr().err
    assert not out.exists()
