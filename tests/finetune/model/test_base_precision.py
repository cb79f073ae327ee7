"""A frozen base in fewer bits is loaded, trains, is saved, continues, streams and is merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models.lm import LMGen
from safetensors.torch import load_file
from training_tools import (
    FULL,
    LORA,
    assert_same_weights,
    checkpoint,
    logged,
    random_batch,
    saved_weights,
    stop_after,
    train,
    trainer,
)

from finetune.config import TrainArgs, load_config
from finetune.errors import UserError
from finetune.inference import load_for_inference, nonfinite_weights
from finetune.model import (
    base_precision,
    count_by_role,
    find_checkpoint,
    load_model,
    plan_model,
    trainable_by_role,
)
from finetune.plan import estimate
from finetune.serve import ExportOptions, export_checkpoint
from ttt import TTTLMModel
from ttt.layers import execution
from ttt.layers.frozen import frozen_linears
from ttt.ops.frozen import KINDS, freeze, thaw

MODES: dict[str, Any] = {"lora": LORA, "ttt alone": {}}


def args_of(config: Path, overrides: Any) -> TrainArgs:
    return load_config(config, {"param_dtype": "float32", **overrides})


def load(config: Path, overrides: Any, device: str = "cpu") -> TTTLMModel:
    args = args_of(config, overrides)
    return load_model(args, find_checkpoint(args.moshi_paths), device)


@torch.no_grad()
def text_logits(model: TTTLMModel) -> torch.Tensor:
    return model.eval()(random_batch()).text_logits.nan_to_num()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_files_in_fewer_bits_and_all_else_is_as_it_is(
    config: Path, kind: str, mode: str
) -> None:
    model = load(config, {**MODES[mode], "base_precision": kind})
    plain = load(config, MODES[mode])
    file = load_file(config.parent / "model/model.safetensors")
    names = {name.replace(".frozen_W", "") for name, _ in frozen_linears(model)}
    assert {
        "transformer.layers.1.self_attn.in_projs.0",
        "transformer.layers.0.gating.linear_in",
        "depformer.layers.0.self_attn.out_projs.2",
        "depformer.layers.0.gating.1.linear_out",
    } <= names
    # W0 of In-Place TTT, the heads, and what is in neither transformer.
    assert not any(name.endswith("0.gating.linear_out") for name in names if "depf" not in name)
    assert not names & {"text_linear", "linears.0", "depformer_in.0"}
    stacked = {"in_projs": "in_proj_weight", "out_projs": "out_proj.weight"}
    for name, layer in frozen_linears(model):
        name = name.replace(".frozen_W", "")
        if name.split(".")[-2] in stacked:
            linear: Any = plain.get_submodule(name)
            weight = getattr(linear, "frozen_W", linear).weight
        else:
            weight = file[f"{name}.weight"]
        expected = freeze(weight, kind)
        assert torch.equal(layer.values, expected.values), name
        assert torch.equal(layer.scales, expected.scales), name
    others = {
        name: p for name, p in plain.named_parameters() if name in dict(model.named_parameters())
    }
    assert_same_weights(dict(model.named_parameters()), others)
    assert count_by_role(model) == count_by_role(plain)
    assert trainable_by_role(model).keys() == trainable_by_role(plain).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_the_same_in_fewer_bits(config: Path, kind: str) -> None:
    random = {**LORA, "moshi_paths.random_init": True}
    plain = dict(load(config, random).named_parameters())
    for name, layer in frozen_linears(load(config, {**random, "base_precision": kind})):
        expected = thaw(freeze(plain[f"{name}.weight"], kind), torch.float32)
        assert torch.equal(layer.thawed(), expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_bit(config: Path, tmp_path: Path, kind: str) -> None:
    how = {**LORA, "base_precision": kind, "ckpt_freq": 2, "max_steps": 6, "optim.lr": 0.03}
    whole = train(config, tmp_path / "whole", how)
    losses = logged(tmp_path / "whole")
    assert losses[-1] < losses[0] and losses[0] > 0
    stop_after(trainer(config, tmp_path / "cut", how), 3)
    again = train(config, tmp_path / "cut", {**how, "resume": True})
    assert_same_weights(saved_weights(tmp_path / "whole", 6), saved_weights(tmp_path / "cut", 6))
    own, other = dict(whole.model.state_dict()), dict(again.model.state_dict())
    assert any(name.endswith("frozen_W.values") for name in own)
    for name, tensor in own.items():
        same = tensor.view(torch.uint8), other[name].view(torch.uint8)
        assert torch.equal(*same), name
    # What the run says is what its checkpoint says; and on another base, nearly that.
    loaded, _ = load_for_inference(checkpoint(tmp_path / "whole", 6), "cpu")
    assert torch.equal(text_logits(loaded), text_logits(whole.model))
    full, _ = load_for_inference(checkpoint(tmp_path / "whole", 6), "cpu", "bfloat16")
    assert not list(frozen_linears(full))
    apart = (text_logits(full) - text_logits(loaded)).norm() / text_logits(full).norm()
    assert 1e-3 < apart < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_base_as_it_was_trained_on(
    config: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {**LORA, "base_precision": kind, "optim.lr": 0.03}
    how |= {"param_dtype": "float32", "save_adapters": False}
    run = train(config, tmp_path / "run", how)
    assert f"LoRA is merged into the base as {kind} keeps it" in capsys.readouterr().out
    merged = load_file(checkpoint(tmp_path / "run", 4) / "consolidated/consolidated.safetensors")
    for name, layer in frozen_linears(run.model):
        lora = dict(run.model.named_modules())[name.removesuffix(".frozen_W")]
        expected = layer.thawed() + lora.scaling * lora.lora_B.weight @ lora.lora_A.weight
        key = name.replace(".frozen_W", ".weight")
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
    loaded, _ = load_for_inference(checkpoint(tmp_path / "run", 4), "cpu")
    assert not list(frozen_linears(loaded))
    apart = (text_logits(loaded) - text_logits(run.model)).norm() / text_logits(loaded).norm()
    # In float8 a product rounds its input as well.
    assert apart < (0.1 if kind == "float8" else 1e-5)


@pytest.mark.parametrize("how", [FULL, {**LORA, "save_adapters": False}], ids=["full", "merged"])
def test_any_checkpoint_is_loaded_in_fewer_bits(config: Path, tmp_path: Path, how: Any) -> None:
    train(config, tmp_path / "run", {**how, "optim.lr": 0.03, "max_steps": 2})
    there = checkpoint(tmp_path / "run", 2)
    saved = load_file(there / "consolidated/consolidated.safetensors")
    model, _ = load_for_inference(there, "cpu", "nf4")
    for name, layer in frozen_linears(model):
        expected = freeze(saved[name.replace(".frozen_W", "") + ".weight"], "nf4")
        assert torch.equal(layer.values, expected.values), name
        assert torch.equal(layer.scales, expected.scales), name
    plain, _ = load_for_inference(there, "cpu")
    assert not list(frozen_linears(plain)) and len(list(frozen_linears(model))) > 10
    full = dict(plain.named_parameters())
    kept = dict(model.named_parameters())
    assert_same_weights(kept, {name: full[name] for name in kept})


@pytest.mark.parametrize("form", ["merged", "adapters"])
def test_an_export_loads_in_stock_moshi(
    config: Path, tmp_path: Path, form: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {**LORA, "base_precision": "nf4", "param_dtype": "float32", "max_steps": 2}
    train(config, tmp_path / "run", how)
    out = tmp_path / "out"
    # It compares with stock `moshi`, and raises where they differ.
    done = export_checkpoint(
        ExportOptions(checkpoint(tmp_path / "run", 2), out, form=form, device="cpu")
    )
    assert done.difference < 1e-5
    assert ("the base was kept in nf4" in capsys.readouterr().out) == (form == "merged")
    assert "base_precision" in (out / "README.md").read_text()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_computes_the_whole_sequence(config: Path, kind: str, mode: str) -> None:
    model = load(config, {**MODES[mode], "base_precision": kind}).eval()
    codes = random_batch(num_frames=12)
    with torch.no_grad():
        whole = model.forward_text(codes)[1]
        with model.streaming(2):
            frames = [model.forward_text(codes[:, :, t : t + 1])[1] for t in range(12)]
    torch.testing.assert_close(torch.cat(frames, 2), whole, rtol=1e-4, atol=1e-4)
    # Stock code speaks with it, the depth transformer too.
    generator = LMGen(model, use_sampling=False)
    with torch.no_grad(), generator.streaming(1):
        said = [generator.step(codes[:1, 5:, t : t + 1]) for t in range(8)]
    assert said[-1] is not None and said[-1].shape == (1, 5, 1)


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "compiled"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_or_recomputed_step_has_the_same_gradients(
    config: Path, kind: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    model = load(config, {**LORA, "base_precision": kind}).train()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    found = {}
    for checkpointing, compiled in ((False, False), (True, compile), ("selective", False)):
        model.execution.checkpointing, model.execution.compile = checkpointing, compiled
        states = model(random_batch(), with_heads=False)
        loss = states.text.square().mean() + states.audio.square().mean()
        model.zero_grad()
        loss.backward()
        found[checkpointing, compiled] = {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }
    expected = found[False, False]
    assert any("depformer.layers" in name for name in expected)
    for how, gradients in found.items():
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            apart = (gradient - expected[name]).norm()
            # e4m3 makes more of a difference in the last digit.
            assert apart <= (2e-2 if kind == "float8" else 1e-4) * expected[name].norm(), (
                how,
                name,
            )


def test_the_plan_counts_what_is_kept(config: Path) -> None:
    weights, wide = {}, 0
    for kind in ("bfloat16", *KINDS):
        args = args_of(config, {**LORA, "base_precision": kind})
        model = plan_model(args, find_checkpoint(args.moshi_paths))
        weights[kind] = estimate(args, model, 1).weights
        wide = sum(m.in_features * m.out_features for _, m in frozen_linears(model)) or wide
    kept = {kind: wide * 4 - (weights["bfloat16"] - weights[kind]) for kind in KINDS}
    assert kept["float8"] == pytest.approx(wide, rel=0.3)  # narrow rows, with a scale each
    assert kept["nf4"] == pytest.approx(wide * 4.5 / 8, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers_are_seen(config: Path, tmp_path: Path, kind: str) -> None:
    model = load(config, {**LORA, "base_precision": kind})
    assert nonfinite_weights(model) is None
    name, layer = next(frozen_linears(model))
    weight = layer.thawed()
    weight[1, 2] = float("inf")
    layer.set_weight(weight)
    assert f"({name}.weight)" in str(nonfinite_weights(model))


def test_mistakes_are_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="full_finetuning, base_precision: weights in nf4 cannot"):
        load_config(config, {**FULL, "base_precision": "nf4"})
    with pytest.raises(UserError, match="base_precision"):
        load_config(config, {**LORA, "base_precision": "int4"})
    monkeypatch.setattr(base_precision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="nf4 needs the package bitsandbytes"):
        load(config, {**LORA, "base_precision": "nf4"})


def test_float8_needs_a_gpu_and_widths_that_have_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(config, {**LORA, "base_precision": "float8"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"8\.9 or later: Ada, Hopper.*A100 has 8\.0"):
        base_precision.require_precision("float8", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match=r"multiples of 16, and .* is \d+ x"):
        base_precision.require_widths(model, "float8", cuda)
