"""Checkpoints that are used from another folder, whose base is gone, or that are damaged."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_tools import LORA, assert_same_weights, checkpoint, sign, train

from finetune.config import changed_keys, load_config, public_dict
from finetune.errors import UserError
from finetune.inference import load_for_inference
from finetune.serve import (
    ExportOptions,
    GenerateOptions,
    answer_recordings,
    export_checkpoint,
    list_jobs,
)


@pytest.fixture
def here(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's checkpoint; its base and an earlier run were named from the folder of before."""
    before = tmp_path / "before"
    shutil.copytree(config.parent / "model", before / "some/base/model")
    monkeypatch.chdir(before)
    base: dict[str, Any] = {"max_steps": 1, "moshi_paths.hf_repo_id": "some/base/model"}
    base |= {"moshi_paths.mimi_path": "some/base/model/mimi.safetensors"}
    train(config, Path("first"), LORA | base)
    init_from = {"moshi_paths.init_from": str(checkpoint(Path("first"), 1))}
    train(config, Path("run"), LORA | base | init_from)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return checkpoint(before / "run", 1)


def uses(saved: Path, tmp_path: Path) -> Iterator[Callable[[], object]]:
    yield lambda: load_for_inference(saved, "cpu")
    yield lambda: export_checkpoint(ExportOptions(saved, tmp_path / "out", device="cpu"))
    audio = tmp_path / "user.wav"
    audio.touch()
    options = GenerateOptions(saved, audio=audio, out=tmp_path / "answer.wav", device="cpu")
    yield lambda: answer_recordings(options, list_jobs(options))


def test_a_checkpoint_is_used_from_everywhere(here: Path, tmp_path: Path) -> None:
    model, _ = load_for_inference(here, "cpu")
    export_checkpoint(ExportOptions(here, tmp_path / "out", device="cpu"))
    assert model.ttt_layers
    # The run itself is told what it was told.
    paths = yaml.safe_load((here / "args.yaml").read_text())["moshi_paths"]
    before = tmp_path / "before"
    assert paths["hf_repo_id"] == str(before / "some/base/model")
    assert paths["init_from"] == str(checkpoint(before / "first", 1))


def test_a_relative_path_is_no_change(
    config: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "before")
    told = {"moshi_paths.hf_repo_id": "some/base/model", "moshi_paths.init_from": "gone/x"}
    told["moshi_paths.mimi_path"] = "some/base/model/mimi.safetensors"
    args = load_config(config, {**LORA, **told, "max_steps": 1})
    assert [*changed_keys(here / "args.yaml", args)] == ["moshi_paths.init_from"]
    # A name on the hub stays one.
    args = load_config(config, {"moshi_paths.hf_repo_id": "me/mine"})
    assert public_dict(args)["moshi_paths"]["hf_repo_id"] == "me/mine"


@pytest.mark.parametrize("gone", ["some/base/model", "first"])
def test_a_base_that_is_gone_is_named_by_key_and_file(
    here: Path, tmp_path: Path, gone: str
) -> None:
    (tmp_path / "before" / gone).rename(tmp_path / "moved")
    key = "hf_repo_id" if gone != "first" else "init_from"
    for use in uses(here, tmp_path):
        with pytest.raises(UserError) as raised:
            use()
        assert str(raised.value).startswith(
            f"{here / 'args.yaml'}: moshi_paths.{key}: there is no folder {tmp_path}/before/{gone}"
        )
        assert str(raised.value).endswith("put it there, or a link to where it lies now.")
    (tmp_path / "before" / gone).symlink_to(tmp_path / "moved")
    load_for_inference(here, "cpu")


def test_an_old_checkpoint_with_a_relative_base_says_where_it_works(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = here / "args.yaml"
    file.write_text(file.read_text().replace(f"{tmp_path}/before/", ""))
    sign(here)
    with pytest.raises(UserError, match="or work in the folder in which its run was started"):
        load_for_inference(here, "cpu")
    monkeypatch.chdir(tmp_path / "before")
    load_for_inference(here, "cpu")


def test_random_weights_are_no_base_of_what_is_trained(config: Path, tmp_path: Path) -> None:
    """Only a new run may begin with them in place of weights that are not there."""
    base = shutil.copytree(config.parent / "model", tmp_path / "base")
    named = LORA | {"moshi_paths.hf_repo_id": str(base)}
    train(config, tmp_path / "run", named | {"max_steps": 2})
    (base / "model.safetensors").unlink()
    longer = named | {"max_steps": 3, "resume": True}
    missing = rf"there is no file {base}/model\.safetensors; correct the path"
    for use in (
        *uses(checkpoint(tmp_path / "run", 2), tmp_path),
        lambda: train(config, tmp_path / "run", longer),
    ):
        with pytest.raises(UserError, match=rf"{missing}\."):
            use()
    with pytest.raises(UserError, match=rf"{missing}, or set moshi_paths\.random_init: true"):
        train(config, tmp_path / "new", named)


def test_nothing_goes_on_from_what_has_diverged(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", LORA | {"ckpt_freq": 2})
    last = checkpoint(tmp_path / "run", 4)
    diverged = last.rename(last.with_name(f"{last.name}.diverged"))
    again = {"moshi_paths.init_from": str(diverged)}
    for use in (*uses(diverged, tmp_path), lambda: train(config, tmp_path / "two", LORA | again)):
        with pytest.raises(UserError) as raised:
            use()
        assert f": {diverged} is of a run that has diverged at its end, and" in str(raised.value)
        assert f"name an earlier one, {checkpoint(tmp_path / 'run', 2)}, or train again with a" in (
            str(raised.value)
        )
    load_for_inference(shutil.copytree(diverged, tmp_path / "to_look_at"), "cpu")


# --- damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"run_dir: [", b"\xff\xfe\xff", b"- 1"])
def test_a_damaged_configuration_of_a_checkpoint_is_called_so(
    finished_run: Callable[..., Any], tmp_path: Path, content: bytes
) -> None:
    saved = checkpoint(finished_run(tmp_path / "run"), 4)
    (saved / "args.yaml").write_bytes(content)
    for use in uses(saved, tmp_path):
        with pytest.raises(UserError, match="so it is damaged: copy its folder again") as raised:
            use()
        assert str(saved / "args.yaml") in str(raised.value)
        assert "example/" not in str(raised.value)


@pytest.mark.parametrize("name", ["ttt.safetensors", "lora.safetensors"])
def test_missing_weights_of_a_checkpoint_are_called_so(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    saved = checkpoint(finished_run(tmp_path / "run", LORA), 4)
    file = saved / "consolidated" / name
    file.unlink()
    again = {"moshi_paths.init_from": str(saved)}
    for use in (*uses(saved, tmp_path), lambda: train(config, tmp_path / "two", LORA | again)):
        with pytest.raises(UserError) as raised:
            use()
        assert str(raised.value) == (
            f"{file} is missing, so the checkpoint is damaged: copy it again, or use another one."
        )
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match=r" is damaged \(it was \d+ bytes long\): copy it again"):
        load_for_inference(saved, "cpu")


def test_a_method_that_is_not_here_is_named(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    saved = checkpoint(finished_run(tmp_path / "run", LORA), 4)
    export_checkpoint(ExportOptions(saved, tmp_path / "out", device="cpu"))
    file = tmp_path / "out/ttt.safetensors"
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["ttt_args"])
    save_file(load_file(file), file, metadata={"ttt_args": json.dumps(told | {"method": "gated"})})
    for use in (
        lambda: load_for_inference(tmp_path / "out", "cpu"),
        lambda: train(config, tmp_path / "b", {"moshi_paths.init_from": str(tmp_path / "out")}),
    ):
        with pytest.raises(UserError, match=r"method 'gated', which is not in ttt/registry\.py"):
            use()
    assert_same_weights(load_file(file), load_file(saved / "consolidated/ttt.safetensors"))
