"""What goes wrong before training begins: one clear message, status 1, and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tools import MIMI_CONFIG
from safetensors.torch import load_file, save_file
from training_tools import FULL, LORA, sign, train

from finetune.cli import run
from finetune.cli import train as train_command
from finetune.config import load_config
from finetune.errors import counted


@pytest.fixture
def model(config: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder, to break."""
    return shutil.copytree(config.parent / "model", tmp_path / "model")


@pytest.fixture
def fails(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Starts the program, which must fail; returns what it says."""

    def start(**overrides: Any) -> str:
        path = overrides.pop("config", config)
        arguments: dict[str, Any] = {"run_dir": str(tmp_path / "run"), **overrides}
        capsys.readouterr()
        assert run(lambda: train_command(str(path), **arguments)) == 1
        error = capsys.readouterr().err
        assert error.startswith("\nerror: ")
        assert len(error) < 1000, "one clear message, not a list"
        return error

    return start


# --- the run folder -------------------------------------------------------------------------------


def test_a_missing_configuration(fails: Callable[..., Any], config: Path) -> None:
    message = fails(config=config.with_name("rum.yaml"))
    assert "There is no configuration file" in message and "Did you mean" in message


def test_an_existing_run(
    fails: Callable[..., Any], finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    message = fails()
    assert "already holds a run" in message
    assert "--resume" in message and "--overwrite_run_dir" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_run_is_replaced_on_request(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", {"ckpt_freq": 1})
    train(config, tmp_path / "run", {"max_steps": 2, "overwrite_run_dir": True})
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint_000002"]


def test_a_folder_that_is_no_run_is_never_deleted(
    fails: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    message = fails()
    assert message.endswith(
        "/run already holds files. Choose another folder, or move away what is there.\n"
    )
    assert "no run folder, so it is not deleted" in fails(overwrite_run_dir=True)
    assert (tmp_path / "run/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ("a run", "continue a run that is there with --resume, or replace it with --overw"),
        ("no checkpoint", "or replace a run that is there, which has no complete checkpoint, with"),
        ("no record", "or continue a run that is there with --resume."),
        ("a link", "or continue a run that is there with --resume."),
        ("a file in the way", "or continue a run that is there with --resume."),
        ("a link, no checkpoint", "or move away what is there."),
    ],
)
def test_no_way_out_is_offered_that_is_refused(
    fails: Callable[..., Any],
    config: Path,
    finished_run: Callable[..., Any],
    tmp_path: Path,
    given: str,
    ways: str,
) -> None:
    made = finished_run(tmp_path / "made")
    if "no checkpoint" in given:
        shutil.rmtree(made / "checkpoints")
    elif given == "no record":  # of an earlier version
        (made / ".run.jsonl").unlink()
    elif given == "a file in the way":
        (made / "checkpoints/checkpoint_000009/consolidated").mkdir(parents=True)
        (made / "checkpoints/checkpoint_000009/consolidated/mine").touch()
    if given.startswith("a link"):
        (tmp_path / "run").symlink_to(made)
    else:
        made.rename(tmp_path / "run")
    message = fails()
    assert f"Choose another folder, {ways}" in message
    if "--overwrite_run_dir" in message:
        train(config, tmp_path / "run", {"max_steps": 1, "overwrite_run_dir": True})
    else:
        fails(overwrite_run_dir=True)


@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_file_in_place_of_the_run_folder(
    fails: Callable[..., Any], tmp_path: Path, resume: bool | str
) -> None:
    (tmp_path / "run").write_text("a file")
    assert "run_dir" in fails(resume=resume)
    assert "run_dir" in fails(resume=resume, overwrite_run_dir=not resume)
    assert (tmp_path / "run").read_text() == "a file"


def test_a_run_folder_that_cannot_be_made(fails: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = fails(run_dir=str(tmp_path / "file/run"))
    assert f"run_dir: cannot write to {tmp_path / 'file/run'}" in message


@pytest.mark.parametrize("where", ["the model", "wandb"])
def test_a_start_that_failed_is_not_in_the_way_of_the_next(
    fails: Callable[..., Any], config: Path, tmp_path: Path, where: str
) -> None:
    if where == "the model":
        fails(**{"moshi_paths.tokenizer_path": str(tmp_path / "nothing")})
    else:
        pytest.importorskip("wandb")
        mistake: dict[str, Any] = {"wandb.project": "p", "wandb.key": "too short"}
        fails(**mistake, **{"data.num_workers": 0})
    train(config, tmp_path / "run")


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, name",
    [
        ("moshi_path", "model.safetensors"),
        ("mimi_path", "mimi.safetensors"),
        ("tokenizer_path", "tokenizer.model"),
        ("config_path", "config.json"),
        ("mimi_config_path", "mimi_config.json"),
    ],
)
def test_a_file_of_the_model(fails: Callable[..., Any], model: Path, key: str, name: str) -> None:
    overrides: dict[str, Any] = {"moshi_paths.hf_repo_id": str(model)}
    content = (model / name).read_bytes()
    (model / name).unlink()
    message = fails(**overrides)
    assert f"moshi_paths.{key}" in message and str(model / name) in message
    (model / name).write_bytes(b"no such thing" * 100)
    message = fails(**overrides)
    assert f"moshi_paths.{key}" in message and str(model / name) in message
    (model / name).write_bytes(content[: len(content) // 2])
    message = fails(**overrides)
    assert f"moshi_paths.{key}" in message and str(model / name) in message
    message = fails(**overrides, **{f"moshi_paths.{key}": str(model / "wrong")})
    assert f"moshi_paths.{key}" in message and str(model / "wrong") in message


def change_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3},
        {"num_layers": 1},
        {"dim": 32},
        {"card": 64},
        {"depformer_num_layers": 2},
        {"dep_q": 6},
        {"delays": [0] * 17},
        {"num_layers": ...},
        {"dim": "large"},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_configuration(
    fails: Callable[..., Any], model: Path, changes: dict[str, Any]
) -> None:
    change_config(model, **changes)
    message = fails(**{"moshi_paths.hf_repo_id": str(model)})
    assert "moshi_paths." in message and "config.json" in message


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"quantize": True}, "quantized"),
        ({"lora_name": "lora.safetensors"}, "LoRA adapters, which are no model"),
        ({"lora": True}, "LoRA adapters, which are no model"),
        ({"gating": "none"}, "needs gated MLPs"),
        ({"fuser": {"sum": []}}, "conditioning"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_trained(
    fails: Callable[..., Any], model: Path, changes: dict[str, Any], expected: str
) -> None:
    change_config(model, **changes)
    assert expected in fails(**{"moshi_paths.hf_repo_id": str(model)})


@pytest.mark.parametrize(
    "changes",
    [
        {"frame_rate": 25},
        {"transformer": ...},
        {"seanet": {**MIMI_CONFIG["seanet"], "dimension": 32}},
        {"quantizer": {**MIMI_CONFIG["quantizer"], "n_q": 2}},
    ],
    ids=["frame rate", "missing part", "other size", "too few codebooks"],
)
def test_a_mimi_that_is_not_as_described(
    fails: Callable[..., Any], model: Path, changes: dict[str, Any]
) -> None:
    change_config(model, "mimi_config.json", **changes)
    assert "moshi_paths.mimi_" in fails(**{"moshi_paths.hf_repo_id": str(model)})


@pytest.mark.parametrize(
    "changes, key",
    [({"card": 16}, "mimi_path"), ({"text_card": 8}, "tokenizer_path")],
    ids=["Mimi", "tokenizer"],
)
def test_codes_that_the_model_does_not_know(
    fails: Callable[..., Any], model: Path, changes: dict[str, Any], key: str
) -> None:
    change_config(model, **changes)
    overrides: dict[str, Any] = {
        "moshi_paths.hf_repo_id": str(model),
        "moshi_paths.random_init": True,
    }
    assert f"moshi_paths.{key}" in fails(**overrides)


def test_weights_of_another_model(fails: Callable[..., Any], config: Path, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["text_linear.bias"] = torch.zeros(3)
    del weights["out_norm.alpha"]
    save_file(weights, model / "model.safetensors")
    message = fails(**{"moshi_paths.hf_repo_id": str(model)})
    assert "1 missing (out_norm.alpha)" in message
    assert "1 unknown (text_linear.bias)" in message


def test_a_first_layer_beyond_the_last(fails: Callable[..., Any]) -> None:
    assert "ttt.start_layer: 2 is beyond the model's last layer, 1" in fails(
        **{"ttt.start_layer": 2}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_where_there_is_none(fails: Callable[..., Any]) -> None:
    message = fails(device="cuda")
    assert "device: cuda, and PyTorch sees no GPU here. Set device: cpu" in message


# --- resuming -------------------------------------------------------------------------------------


def test_resuming_nothing(fails: Callable[..., Any]) -> None:
    assert "no complete checkpoint" in fails(resume=True)


def test_resuming_with_another_configuration_names_the_right_one(
    fails: Callable[..., Any], finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path / "run", LORA)
    message = fails(resume=True, **FULL)
    named = tmp_path / "run/checkpoints/checkpoint_000004/args.yaml"
    assert str(named) in message
    assert load_config(named).lora.enable


def test_resuming_what_another_version_wrote(
    fails: Callable[..., Any], finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path / "run")
    saved = tmp_path / "run/checkpoints/checkpoint_000004"
    shutil.rmtree(saved / "resume")
    (saved / "manifest.json").unlink()
    message = fails(resume=True)
    assert "another version" in message and f"moshi_paths.init_from: {saved}" in message


def test_resuming_a_state_that_holds_something_else(
    fails: Callable[..., Any], finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path / "run")
    saved = tmp_path / "run/checkpoints/checkpoint_000004"
    for content in ({"step": 4}, b"no tensors"):
        if isinstance(content, dict):
            torch.save(content, saved / "resume.pt")
        else:
            (saved / "resume.pt").write_bytes(content)
        sign(saved)
        message = fails(resume=True)
        expected = "another version" if isinstance(content, dict) else "cannot read"
        assert expected in message and str(saved) in message


# --- the data -------------------------------------------------------------------------------------


def test_data_that_is_not_there(fails: Callable[..., Any], tmp_path: Path) -> None:
    assert "data.train_data" in fails(**{"data.train_data": str(tmp_path / "none.jsonl")})
    overrides: dict[str, Any] = {"do_eval": True, "data.eval_data": str(tmp_path / "none.jsonl")}
    assert "data.eval_data" in fails(**overrides)


def test_a_recording_that_breaks_in_the_middle_of_the_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(config.parent / "train", tmp_path / "train")
    overrides: dict[str, Any] = {
        "data.train_data": str(folder / "all.jsonl"),
        "run_dir": str(tmp_path / "run"),
    }
    (folder / "2.json").write_text("{}")
    assert run(lambda: train_command(str(config), **overrides)) == 1
    message = capsys.readouterr().err
    assert "2.json" in message and "on_error" in message
    overrides |= {"data.on_error": "skip", "max_steps": 8, "overwrite_run_dir": True}
    assert run(lambda: train_command(str(config), **overrides)) == 0


def test_what_is_counted_agrees_with_its_number() -> None:
    assert [counted(number, "file") for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    verbs = "recording was", "recordings were"
    assert [counted(number, *verbs) for number in (1, 3)] == [
        "1 recording was",
        "3 recordings were",
    ]


def test_half_of_what_torchrun_sets_is_named(
    fails: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is left in a cluster's shell."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "WORLD_SIZE is 2 in the environment, and RANK is not set" in fails()
