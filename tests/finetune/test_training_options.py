"""Every option of a configuration reaches the run, and what must not matter does not."""

from pathlib import Path
from typing import Any

import pytest
from training_tools import (
    FULL,
    LORA,
    assert_same_weights,
    logged,
    logged_steps,
    saved_weights,
    train,
)

from ttt.layers import execution

EXACT: dict[str, Any] = {**FULL, "param_dtype": "float32", "max_steps": 3, "do_ckpt": False}
"""Losses and no checkpoint; what trains shows in them from the second step on."""


@pytest.fixture(scope="module")
def baseline(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of three steps with everything switched on."""
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    train(config, run_dir, EXACT)
    return logged(run_dir)


@pytest.mark.parametrize(
    "option, value",
    [
        ("full_finetuning", False),
        ("first_codebook_weight_multiplier", 2.0),
        ("text_padding_weight", 0.1),
        ("duration_sec", 1.6),
        ("batch_size", 3),
        ("num_microbatches", 2),
        ("max_norm", 1e-9),
        ("seed", 1),
        ("param_dtype", "bfloat16"),
        ("optim.lr", 1e-3),
        ("optim.ttt_lr", 3e-2),
        ("optim.weight_decay", 10.0),
        ("optim.pct_start", 0.6),
        ("data.shuffle", False),
        ("ttt.enabled", False),
        ("ttt.start_layer", 1),
        ("ttt.layer_frequency", 2),
        ("ttt.chunk_size", 4),
        ("ttt.learning_rate", 2.0),
        ("ttt.lr_scale", "none"),
        ("ttt.target", "input"),
        ("ttt.target", "text"),
        ("ttt.conv_kernel_size", 3),
        ("ttt.conv_lookahead", 0),
        ("ttt.max_delta_norm", 1e-4),
    ],
)
def test_an_option_changes_the_run(
    config: Path, tmp_path: Path, baseline: list[float], option: str, value: float | str
) -> None:
    train(config, tmp_path, {**EXACT, option: value})
    assert logged(tmp_path) != baseline


@pytest.mark.parametrize(
    "option, value",
    [
        ("gradient_checkpointing", True),
        ("gradient_checkpointing", "selective"),
        ("selective_layers", 1),
        ("data.num_workers", 2),
        ("do_eval", True),
        ("log_freq", 1),
    ],
)
def test_an_option_that_must_not_matter_changes_nothing(
    config: Path,
    tmp_path: Path,
    baseline: list[float],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str | int,
) -> None:
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    checkpointed = {"gradient_checkpointing": True} if option == "selective_layers" else {}
    train(config, tmp_path, {**EXACT, **checkpointed, option: value})
    assert logged(tmp_path) == baseline


@pytest.mark.parametrize("option, value", [("lora.rank", 4), ("lora.scaling", 3.0)])
def test_an_option_of_lora_changes_the_run(
    config: Path, tmp_path: Path, option: str, value: float
) -> None:
    steps: dict[str, Any] = {**LORA, "max_steps": 3, "do_ckpt": False}
    train(config, tmp_path / "one", steps)
    train(config, tmp_path / "other", {**steps, option: value})
    assert logged(tmp_path / "one") != logged(tmp_path / "other")


def test_ttt_has_no_weight_decay(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "one")
    train(config, tmp_path / "other", {"optim.weight_decay": 10.0})
    assert_same_weights(saved_weights(tmp_path / "one", 4), saved_weights(tmp_path / "other", 4))


def test_lines_are_logged_as_often_as_asked_for(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path, {"max_steps": 7, "log_freq": 3})
    assert logged_steps(tmp_path) == [3, 6, 7]
