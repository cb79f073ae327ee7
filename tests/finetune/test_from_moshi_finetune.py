"""A configuration and a data set of `moshi-finetune` train unchanged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from moshi_finetune_tools import MOSHI_FINETUNE
from recordings_tools import call
from training_tools import logged, write_dataset, write_model

CHANGED = {"data.shuffle", "seed", "overwrite_run_dir"}
"""Keys of the example file that mean something else here."""


@pytest.fixture
def filled_in(tmp_path: Path) -> Path:
    """The example file with its blanks filled in, and data as `moshi-finetune` wants them."""
    lines = write_dataset(tmp_path / "data", [2.0, 2.0, 1.0])
    for path in lines.parent.glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"text_conditions": None}))
    text = MOSHI_FINETUNE
    for blank, value in (
        ("'train.jsonl'", lines),
        ('"kyutai/moshiko-pytorch-bf16"', write_model(tmp_path / "model")),
        ('"run"', tmp_path / "run"),
    ):
        assert blank in text
        text = text.replace(blank, json.dumps(str(value)))
    path = tmp_path / "moshi_7B.yaml"
    path.write_text(text)
    return path


def start(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Train a few steps, short ones; returns all that was said."""
    small = ["--duration_sec=2", "--batch_size=1", "--max_steps=3", "--device=cpu"]
    assert call("train", "--config", path, *small, *options) == 0
    said = capsys.readouterr()
    return said.out + said.err


def named_as_changed(said: str) -> list[str]:
    lines = re.findall(r"unlike in moshi-finetune, ([^:]*):", said)
    return sorted(key for keys in lines for key in keys.split(", "))


def test_it_trains_and_each_changed_key_is_named_once(
    filled_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = start(filled_in, capsys)
    assert len(logged(tmp_path / "run")) == 3
    assert named_as_changed(said) == sorted(CHANGED)
    for key in CHANGED:
        assert len(re.findall(rf"\b{re.escape(key)}\b", said)) == 1, said
    assert "text_conditions" in said, "what the transcripts hold and is not used"


def test_what_else_a_file_may_hold(filled_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The args.yaml of a run of `moshi-finetune` has all keys, with evaluation and microbatches."""
    content: dict[str, Any] = yaml.safe_load(filled_in.read_text())
    content["data"]["eval_data"] = content["data"]["train_data"]
    content |= {"world_size": 8, "num_ckpt_keep": 2, "num_microbatches": 2, "do_eval": True}
    filled_in.write_text(yaml.safe_dump(content))
    more = {"world_size", "num_ckpt_keep", "num_microbatches", "eval_freq"}
    assert named_as_changed(start(filled_in, capsys)) == sorted(CHANGED | more)


def test_a_file_of_this_project_is_not_explained(
    filled_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled_in.write_text(filled_in.read_text() + "ttt: {enabled: false}\n")
    assert named_as_changed(start(filled_in, capsys)) == []
