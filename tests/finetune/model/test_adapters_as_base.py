"""Checkpoints of `moshi-finetune`, and adapters alone, given as a model: what works, and what is
said where it does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_tools import LORA, assert_same_weights, checkpoint, saved_weights, train

from finetune.errors import UserError
from finetune.inference import load_for_inference

OPTIONS: dict[str, Any] = {**LORA, "ttt.enabled": False, "max_steps": 2, "param_dtype": "float32"}


def of_moshi_finetune(config: Path, folder: Path, run: Path) -> Path:
    """Return a checkpoint's weights as `moshi-finetune` leaves them: without an args.yaml, and with
    the base's config.json, in which `lora` is true whether or not the adapters are merged."""
    weights = folder / "checkpoints/checkpoint_000002/consolidated"
    shutil.copytree(checkpoint(run, 2) / "consolidated", weights)
    base = json.loads((config.parent / "model/config.json").read_text())
    lora = {"lora": True, "lora_rank": 2, "lora_scaling": 2.0}
    (weights / "config.json").write_text(json.dumps(base | lora))
    return weights


@pytest.fixture
def adapters(config: Path, tmp_path: Path) -> Path:
    train(config, tmp_path / "run", OPTIONS)
    return of_moshi_finetune(config, tmp_path / "there", tmp_path / "run")


@pytest.fixture
def merged(config: Path, tmp_path: Path) -> Path:
    train(config, tmp_path / "run", OPTIONS | {"save_adapters": False})
    return of_moshi_finetune(config, tmp_path / "there", tmp_path / "run")


def refusal(config: Path, tmp_path: Path, **paths: Any) -> str:
    keys = {f"moshi_paths.{key}": value for key, value in paths.items()}
    with pytest.raises(UserError) as raised:
        train(config, tmp_path / "refused", OPTIONS | keys)
    return str(raised.value)


def test_adapters_are_gone_on_with(config: Path, tmp_path: Path, adapters: Path) -> None:
    start = {"moshi_paths.init_from": adapters, "optim.lr": 0, "max_steps": 1}
    train(config, tmp_path / "further", OPTIONS | start)
    further = saved_weights(tmp_path / "further", 1)
    assert_same_weights(further, saved_weights(tmp_path / "run", 2))


def test_merged_weights_are_gone_on_with(config: Path, tmp_path: Path, merged: Path) -> None:
    start = {"moshi_paths.moshi_path": merged / "consolidated.safetensors", "optim.lr": 0}
    again = {"save_adapters": False, "max_steps": 1}
    train(config, tmp_path / "further", OPTIONS | start | again)
    further = checkpoint(tmp_path / "further", 1) / "consolidated"
    assert_same_weights(
        load_file(further / "consolidated.safetensors"),
        load_file(merged / "consolidated.safetensors"),
    )


@pytest.mark.parametrize("with_other_files", [False, True])
def test_adapters_named_as_a_model_are_told_where_they_belong(
    config: Path, tmp_path: Path, adapters: Path, with_other_files: bool
) -> None:
    """They were told to correct the path of a file that nobody had named, or to begin at random."""
    if with_other_files:
        for path in (config.parent / "model").iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                shutil.copy(path, adapters)
    way = f"as moshi_paths.hf_repo_id, and {adapters} as moshi_paths.init_from"
    for named in (
        {"hf_repo_id": adapters},
        {"moshi_path": adapters / "lora.safetensors"},
    ):
        said = refusal(config, tmp_path, **named)
        assert str(adapters) in said and "LoRA adapters" in said and way in said
    shape = {"config_path": adapters / "config.json"}
    assert "by their config.json (lora) these are LoRA adapters" in refusal(
        config, tmp_path, **shape
    )
    with pytest.raises(UserError, match="name the checkpoint of their run, or have them merged"):
        load_for_inference(adapters, "cpu")


def test_adapters_of_this_project_are_named_by_their_checkpoint(
    config: Path, tmp_path: Path, adapters: Path
) -> None:
    own = checkpoint(tmp_path / "run", 2)
    said = refusal(config, tmp_path, hf_repo_id=own / "consolidated")
    assert f"hf_repo_id, and {own} as moshi_paths.init_from" in said


def test_merged_weights_named_as_a_folder_are_told_their_key(
    config: Path, tmp_path: Path, merged: Path
) -> None:
    for named in ({"hf_repo_id": merged}, {"init_from": merged}):
        said = refusal(config, tmp_path, **named)
        assert f"{merged}/consolidated.safetensors as moshi_paths.moshi_path" in said


@pytest.mark.parametrize("kind", ["adapters", "merged"])
def test_a_checkpoint_without_an_args_file_is_told_what_it_is_good_for(
    config: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    weights = request.getfixturevalue(kind)
    said = refusal(config, tmp_path, init_from=weights.parent)
    key = "init_from" if kind == "adapters" else "moshi_path"
    file = "" if kind == "adapters" else "/consolidated.safetensors"
    assert f"with moshi_paths.{key}: {weights}{file}." in said
