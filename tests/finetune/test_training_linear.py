"""Training runs with TTT-Linear and TTT-MLP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_codes, tiny_linear_args, tiny_model
from training_tools import (
    LORA,
    assert_same_weights,
    checkpoint,
    logged,
    random_batch,
    train,
)

from finetune.checkpoint import load_trained_weights
from finetune.config import load_config
from finetune.model import find_checkpoint, load_model, parameters_by_role
from ttt import TTTLMModel
from ttt.layers import mixer

LINEAR: dict[str, Any] = {
    "ttt.method": "linear",
    "ttt.mini_batch_size": 4,
    "param_dtype": "float32",
    "optim.ttt_lr": 3e-2,
}
LOSSES_ALONE: dict[str, Any] = {**LINEAR, "max_steps": 3, "do_ckpt": False}


@pytest.fixture(scope="module")
def baseline(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    train(config, run_dir, LOSSES_ALONE)
    return logged(run_dir)


@pytest.mark.parametrize(
    "option, value",
    [
        ("ttt.method", "mlp"),
        ("ttt.mini_batch_size", 5),
        ("ttt.base_lr", 4.0),
        ("ttt.gate_init", 0.5),
        ("ttt.attention_context", 3),
        ("ttt.start_layer", 1),
        ("ttt.layer_frequency", 2),
    ],
)
def test_an_option_changes_the_run(
    config: Path, tmp_path: Path, baseline: list[float], option: str, value: str | float
) -> None:
    train(config, tmp_path, {**LOSSES_ALONE, option: value})
    assert logged(tmp_path) != baseline


@pytest.mark.parametrize(
    "option, value", [("ttt.scan_checkpoint_group_size", 1), ("gradient_checkpointing", True)]
)
def test_what_is_kept_for_the_backward_pass_changes_nothing(
    config: Path, tmp_path: Path, baseline: list[float], option: str, value: int
) -> None:
    train(config, tmp_path, {**LOSSES_ALONE, option: value})
    assert logged(tmp_path) == pytest.approx(baseline, rel=1e-6)


def test_rope_changes_the_losses_from_the_second_step_on(
    config: Path, tmp_path: Path, baseline: list[float]
) -> None:
    """The first is that of the model without TTT, and the output projection's gradient."""
    rope_on = {**LOSSES_ALONE, "ttt.use_rope": True}
    train(config, tmp_path / "rope", rope_on)
    rope = logged(tmp_path / "rope")
    assert rope[0] == baseline[0]
    assert all(a != b for a, b in zip(rope[1:], baseline[1:], strict=True))
    train(config, tmp_path / "fast", {**rope_on, "ttt.rope_theta": 10.0})
    assert logged(tmp_path / "fast")[1:] != rope[1:]


@pytest.mark.parametrize("method", ["linear", "mlp"])
def test_a_checkpoint_gives_back_the_model_with_its_ttt(
    config: Path, tmp_path: Path, method: str
) -> None:
    run = train(config, tmp_path, {**LINEAR, "ttt.method": method, "optim.ttt_lr": 0.1})
    saved = checkpoint(tmp_path, 4)
    args = load_config(saved / "args.yaml")
    model = load_model(args, find_checkpoint(args.moshi_paths), "cpu").eval()
    codes = random_batch()
    with torch.no_grad():
        trained = run.model.eval()(codes).text_logits
        assert not torch.equal(model(codes).text_logits, trained)
        load_trained_weights(model, args, saved)
        assert torch.equal(model(codes).text_logits, trained)


def load(config: Path, overrides: dict[str, Any]) -> TTTLMModel:
    args = load_config(config, {**LINEAR, **overrides})
    return load_model(args, find_checkpoint(args.moshi_paths), "cpu")


def test_parameters_of_ttt_train_whole_and_depend_on_the_seed_alone(config: Path) -> None:
    model = load(config, LORA)
    roles = parameters_by_role(model)
    assert set(roles["ttt"]) == {name for name, _ in model.named_parameters() if ".ttt." in name}
    assert all(parameter.requires_grad for parameter in roles["ttt"].values())
    assert not any(".ttt." in name for name in roles["lora"])
    torch.rand(7)
    assert_same_weights(dict(load(config, LORA).named_parameters()), dict(model.named_parameters()))
    other = parameters_by_role(load(config, {**LORA, "seed": 1}))["ttt"]
    drawn = "transformer.layers.0.ttt.in_proj"
    assert not torch.equal(other[drawn], roles["ttt"][drawn])
    rounded = load(config, {**LORA, "param_dtype": "bfloat16"})
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}


def test_a_run_tells_what_ttt_does(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path, {**LINEAR, "ttt.method": "mlp", "ttt.attention_context": 7})
    out = capsys.readouterr().out
    assert "mlp in layers 0, 1; up to 6 updates a sequence, every 4 frames (0.3 s); " in out
    assert "attention sees 12 frames of 25, and 7 in the layers that ttt names" in out
    assert "WARNING" not in out
    effects = logged(tmp_path, "ttt/layer_01/effect")
    assert effects[0] == 0 < effects[-1]
    for name in ("initial", "before", "after"):
        assert all(loss > 0 for loss in logged(tmp_path, f"ttt/layer_01/inner_loss_{name}"))


def test_a_sequence_without_an_update_is_warned_of(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path, {**LINEAR, "ttt.mini_batch_size": 25, "max_steps": 1})
    out = capsys.readouterr().out
    assert "not longer than ttt.mini_batch_size (25 frames): TTT carries nothing on" in out


@pytest.mark.parametrize("mode", [False, "selective", True])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("is_kernel", [True, False])
def test_a_scan_keeps_everything_where_a_kernel_and_one_layer_at_a_time_do(
    mode: bool | str, size: int | None, is_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a group size of its own, that one. The plain scan would keep all weights as well."""
    seen = set()
    monkeypatch.setattr(mixer, "has_kernel", lambda *_: is_kernel)

    def watched(*args: Any, scan_checkpoint_group_size: Any, **kwargs: Any) -> Any:
        seen.add(scan_checkpoint_group_size)
        return scan(*args, scan_checkpoint_group_size=scan_checkpoint_group_size, **kwargs)

    scan = mixer.inner_scan
    monkeypatch.setattr(mixer, "inner_scan", watched)
    model = tiny_model(tiny_linear_args(scan_checkpoint_group_size=size)).train()
    model.execution.checkpointing = mode
    output = model(random_codes(num_frames=12), with_heads=False)
    output.text.sum().backward()
    assert seen == {size or (None if mode is True and is_kernel else 16)}
