"""Weights that are no longer those that a run has written are not used, whatever asks for them."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from evaluation_tools import options
from training_tools import FULL, LORA, checkpoint, run_ranks, sign, train

from finetune.checkpoint import manifest
from finetune.errors import UserError
from finetune.evaluation import evaluate_checkpoint
from finetune.inference import load_for_inference
from finetune.serve import ExportOptions, export_checkpoint

REMEDY = "copy it again, or use another one."

NAMES = ["args.yaml", "config.json", "consolidated.safetensors", "mimi_config.json"]
NAMES += ["ttt.safetensors"]
"""Files of a checkpoint that are compared."""


def zero(file: Path) -> None:
    """Zero bytes among the weights of a file, as a copy that went wrong does."""
    content = bytearray(file.read_bytes())
    content[-400:-100] = bytes(300)
    assert content != file.read_bytes()
    file.write_bytes(content)


def altered(file: Path) -> str:
    return f"{file} is damaged (its checksum is not that in {manifest.NAME}): {REMEDY}"


@pytest.fixture
def refuses(config: Path, tmp_path: Path) -> Callable[..., None]:
    def check(saved: Path, message: str, overrides: dict[str, Any]) -> None:
        """All that loads a checkpoint says this, and leaves nothing."""
        data = config.parent / "eval/all.jsonl"
        again = {**overrides, "moshi_paths.init_from": str(saved)}
        uses: list[Callable[[], object]] = [
            lambda: load_for_inference(saved, "cpu"),
            lambda: export_checkpoint(ExportOptions(saved, tmp_path / "out", device="cpu")),
            lambda: evaluate_checkpoint(options((saved, data), tmp_path / "evaluation")),
            lambda: train(config, tmp_path / "two", again),
        ]
        for use in uses:
            with pytest.raises(UserError) as raised:
                use()
            assert str(raised.value) == message
        assert not (tmp_path / "out").exists() and not (tmp_path / "two").exists()
        assert not (tmp_path / "evaluation/results.json").exists()

    return check


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("consolidated.safetensors", FULL), ("lora.safetensors", LORA), ("ttt.safetensors", LORA)],
)
def test_damaged_weights_are_not_used(
    finished_run: Callable[..., Any],
    refuses: Callable[..., None],
    tmp_path: Path,
    name: str,
    overrides: dict[str, Any],
) -> None:
    saved = checkpoint(finished_run(tmp_path / "run", overrides), 4)
    load_for_inference(saved, "cpu")
    file = saved / "consolidated" / name
    zero(file)
    refuses(saved, altered(file), overrides)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    refuses(saved, f"{file} is damaged (it was {size} bytes long): {REMEDY}", overrides)


def test_a_configuration_that_was_changed_is_not_used(
    finished_run: Callable[..., Any], refuses: Callable[..., None], tmp_path: Path
) -> None:
    """With another scaling the adapters are another model."""
    saved = checkpoint(finished_run(tmp_path / "run", LORA), 4)
    file = saved / "args.yaml"
    text = file.read_text()
    file.write_text(text.replace("scaling: 2.0", "scaling: 3.0"))
    assert file.read_text() != text
    refuses(saved, altered(file), LORA | {"lora.scaling": 3.0})


def test_what_training_alone_continues_from_may_be_missing(
    finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    saved = checkpoint(finished_run(tmp_path / "run", LORA), 4)
    shutil.rmtree(saved / "resume")
    (saved / "resume.pt").unlink()
    load_for_inference(saved, "cpu")


def test_a_base_that_is_a_damaged_checkpoint_is_not_used(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Also where it is a run further down, or is named as a file."""
    first = checkpoint(finished_run(tmp_path / "first", FULL), 4)
    train(config, tmp_path / "run", LORA | {"max_steps": 1, "moshi_paths.init_from": str(first)})
    second = checkpoint(tmp_path / "run", 1)
    load_for_inference(second, "cpu")
    file = first / "consolidated/consolidated.safetensors"
    zero(file)
    (tmp_path / "link.safetensors").symlink_to(file)
    named = [{"moshi_paths.init_from": str(second)}]
    named += [
        {"moshi_paths.moshi_path": str(each)} for each in (file, tmp_path / "link.safetensors")
    ]
    uses: list[Callable[[], object]] = [
        partial(train, config, tmp_path / "two", LORA | each) for each in named
    ]
    for use in (*uses, lambda: load_for_inference(second, "cpu")):
        with pytest.raises(UserError) as raised:
            use()
        assert str(raised.value) == altered(file)


@pytest.mark.parametrize("name", ["model.safetensors", "ttt.safetensors"])
def test_a_damaged_export_is_not_used(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    saved, out = checkpoint(finished_run(tmp_path / "run", LORA), 4), tmp_path / "out"
    export_checkpoint(ExportOptions(saved, out, device="cpu"))
    # Its owner completes the card, and may cut the window of attention.
    for text in ("README.md", "config.json"):
        (out / text).write_text((out / text).read_text() + "\n")
    uses: list[Callable[[], object]] = [lambda: load_for_inference(out, "cpu")]
    for number, key in enumerate(("init_from", "hf_repo_id")):
        given = FULL | {"max_steps": 1, f"moshi_paths.{key}": str(out)}
        uses.append(partial(train, config, tmp_path / f"{number}", given))
    for use in uses:
        use()
        shutil.rmtree(tmp_path / "0", ignore_errors=True)
        shutil.rmtree(tmp_path / "1", ignore_errors=True)
    zero(out / name)
    for use in uses:
        with pytest.raises(UserError) as raised:
            use()
        assert str(raised.value) == altered(out / name)
    # Of an earlier version, or of somebody else, nothing is known.
    (out / manifest.NAME).unlink()
    load_for_inference(out, "cpu")


def test_the_first_of_several_processes_compares_and_all_refuse(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    code = """
from finetune.checkpoint import manifest, require_sound_start
from finetune.config import ModelPaths
from finetune.distributed import join_world
from finetune.errors import UserError
import sys
world = join_world("cpu")
read = []
known = manifest._checksum
manifest._checksum = lambda file: read.append(file.name) or known(file)
try:
    require_sound_start(ModelPaths(init_from=sys.argv[1]), world)
    print(world.rank, "sound", sorted(read))
except UserError as error:
    print(world.rank, error)
world.close()
"""
    saved = checkpoint(finished_run(tmp_path / "run", FULL), 4)

    def told() -> list[str]:
        lines = run_ranks(2, code, saved).splitlines()
        return sorted(line for line in lines if not line.startswith("[Gloo]"))

    names = [*NAMES]
    assert told() == [f"0 sound {names}", "1 sound []"]
    file = saved / "consolidated/consolidated.safetensors"
    zero(file)
    assert told() == [f"{rank} {altered(file)}" for rank in (0, 1)]


def test_each_file_is_read_once_in_a_command(
    finished_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint(finished_run(tmp_path / "run", FULL), 4)
    read: list[str] = []
    known = manifest._checksum

    def noted(file: Path) -> str:
        read.append(file.name)
        return known(file)

    monkeypatch.setattr(manifest, "_checksum", noted)
    export_checkpoint(ExportOptions(saved, tmp_path / "out", device="cpu"))
    assert sorted(read) == sorted([*NAMES, *manifest.read(tmp_path / "out")])
    read.clear()
    load_for_inference(tmp_path / "out", "cpu")
    assert sorted(read) == sorted(manifest.read(tmp_path / "out"))
    assert {"model.safetensors", "ttt.safetensors"} <= {*read} and "README.md" not in read


def test_without_a_list_of_its_files_a_checkpoint_is_used_with_a_warning(
    finished_run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Earlier versions wrote none."""
    saved = checkpoint(finished_run(tmp_path / "run", LORA), 4)
    (saved / manifest.NAME).unlink()
    load_for_inference(saved, "cpu")
    assert caplog.messages == [
        f"{saved} has no {manifest.NAME}: whether its files are damaged is not known"
    ]
    sign(saved)
    caplog.clear()
    load_for_inference(saved, "cpu")
    assert caplog.messages == []


@pytest.mark.parametrize("text", ['{"name": "x"}', "[]", "no JSON"])
def test_another_programs_list_in_the_folder_of_a_model_is_passed_over(
    finished_run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    saved, out = checkpoint(finished_run(tmp_path / "run", LORA), 4), tmp_path / "out"
    export_checkpoint(ExportOptions(saved, out, device="cpu"))
    (out / manifest.NAME).write_text(text)
    load_for_inference(out, "cpu")
    assert any("is no list of files as exported models have it" in each for each in caplog.messages)


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("init_from", "consolidated/consolidated.safetensors"),
        ("moshi_path", "consolidated/consolidated.safetensors"),
        ("hf_repo_id", "model.safetensors"),
    ],
)
def test_cut_off_weights_are_named_by_the_key_that_names_them(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path, key: str, file: str
) -> None:
    """Also where no list says that they are damaged."""
    if key == "hf_repo_id":
        folder = named = shutil.copytree(config.parent / "model", tmp_path / "base")
    else:
        folder = checkpoint(finished_run(tmp_path / "run", FULL), 4)
        (folder / manifest.NAME).unlink()
        named = folder if key == "init_from" else folder / file
    (folder / file).write_bytes((folder / file).read_bytes()[:5000])
    with pytest.raises(UserError) as raised:
        train(config, tmp_path / "two", FULL | {f"moshi_paths.{key}": str(named)})
    told = key.replace("hf_repo_id", "moshi_path")  # which would name this file of its folder
    assert str(raised.value).startswith(f"moshi_paths.{told}: cannot read {folder / file}: ")
    assert str(raised.value).endswith(f". The checkpoint is damaged: {REMEDY}")
