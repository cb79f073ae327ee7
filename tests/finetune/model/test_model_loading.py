"""From a checkpoint and a configuration to a model: what it computes, and what trains of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file
from training_tools import (
    FULL,
    LM_CONFIG,
    LORA,
    assert_same_weights,
    random_batch,
    train,
    trainer,
    write_model,
)

from finetune.config import ModelPaths, load_config
from finetune.model import (
    find_checkpoint,
    frozen_fingerprint,
    load_model,
    parameters_by_role,
    plan_model,
    trainable_by_role,
)
from ttt import TTTLMModel

MODES: dict[str, Any] = {
    "full": ({**FULL}, {"base", "embedding", "ttt"}),
    "lora": ({**LORA}, {"lora", "ttt"}),
    "lora and embeddings": ({**LORA, "lora.ft_embed": True}, {"lora", "embedding", "ttt"}),
    "ttt alone": ({}, {"ttt"}),
    "full without ttt": ({**FULL, "ttt.enabled": False}, {"base", "embedding"}),
    "lora without ttt": ({**LORA, "ttt.enabled": False}, {"lora"}),
}


def load(config: Path, overrides: dict[str, Any] | None = None) -> TTTLMModel:
    args = load_config(config, {"param_dtype": "float32", **(overrides or {})})
    return load_model(args, find_checkpoint(args.moshi_paths), "cpu")


@torch.no_grad()
def logits(model: TTTLMModel) -> tuple[Any, Any]:
    output = model.eval()(random_batch())
    return output.text_logits, output.logits


def weights(model: TTTLMModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stock(config: Path) -> Any:
    base = config.parent / "model"
    info = CheckpointInfo.from_hf_repo(
        "nobody/nothing",
        moshi_weights=base / "model.safetensors",
        mimi_weights=base / "mimi.safetensors",
        tokenizer=base / "tokenizer.model",
        config_path=base / "config.json",
        mimi_config_path=base / "mimi_config.json",
    )
    return info.get_moshi(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_before_training_the_model_is_stock_moshi(config: Path, mode: str) -> None:
    overrides, _ = MODES[mode]
    for found, expected in zip(logits(load(config, overrides)), logits(stock(config)), strict=True):
        # Not to the bit: torch multiplies by frozen weights in another way.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_to_train_changes_and_all_else_stays_to_the_bit(
    config: Path, tmp_path: Path, mode: str
) -> None:
    overrides, roles = MODES[mode]
    run = trainer(config, tmp_path, {**overrides, "max_steps": 3, "do_ckpt": False})
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    by_role = parameters_by_role(run.model)
    assert set(trainable_by_role(run.model)) == roles
    for role, named in by_role.items():
        changed = {name for name in named if not torch.equal(before[name], after[name])}
        assert changed == (set(named) if role in roles else set()), role


def test_roles_follow_from_the_kind_of_module(config: Path) -> None:
    roles = parameters_by_role(load(config, LORA))
    embeddings = {"text_emb", "depformer_text_emb"}
    embeddings |= {f"emb.{index}" for index in range(8)}
    embeddings |= {f"depformer_emb.{index}" for index in range(3)}
    assert set(roles["embedding"]) == {f"{name}.weight" for name in embeddings}
    assert set(roles["ttt"]) == {
        f"transformer.layers.{layer}.gating.{name}"
        for layer in (0, 1)
        for name in ("target_conv", "target_proj", "target_gate")
    }
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in roles["lora"])
    # Of every linear layer, also in the depformer and of the heads.
    assert {
        "text_linear.lora_A.weight",
        "linears.3.lora_B.weight",
        "depformer_in.0.lora_A.weight",
        "transformer.layers.1.gating.linear_out.lora_A.weight",
        "depformer.layers.0.gating.2.linear_in.lora_B.weight",
    } <= set(roles["lora"])
    assert "out_norm.alpha" in roles["base"]
    assert "text_linear.frozen_W.weight" in roles["base"]
    assert sum(map(len, roles.values())) == len(list(load(config, LORA).parameters()))


def test_new_parameters_depend_on_the_seed_alone(config: Path) -> None:
    torch.manual_seed(7)
    first = weights(load(config, LORA))
    torch.manual_seed(8)
    assert_same_weights(weights(load(config, LORA)), first)
    other = weights(load(config, {**LORA, "seed": 1}))
    assert not torch.equal(other["text_linear.lora_A.weight"], first["text_linear.lora_A.weight"])


def test_a_random_start_needs_no_weights_and_depends_on_the_seed_alone(
    config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(config.parent / "model", folder)
    (folder / "model.safetensors").unlink()
    overrides: dict[str, Any] = {
        "moshi_paths.random_init": True,
        "moshi_paths.hf_repo_id": str(folder),
    }
    first = weights(load(config, overrides))
    torch.rand(3)
    assert_same_weights(weights(load(config, overrides)), first)
    assert not torch.equal(
        weights(load(config, {**overrides, "seed": 1}))["text_emb.weight"], first["text_emb.weight"]
    )
    losses = train(config, tmp_path / "run", {**overrides, "max_steps": 1})
    assert losses.step == 1


def test_weights_come_in_the_configured_type_whatever_that_of_the_file(config: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        model = load(config, {**LORA, "param_dtype": dtype})
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_files_can_be_named_one_by_one(config: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {
        "moshi_path": "weights.safetensors",
        "mimi_path": "codec.safetensors",
        "tokenizer_path": "words.model",
        "config_path": "shape.json",
        "mimi_config_path": "codec.json",
    }
    originals = ["model.safetensors", "mimi.safetensors", "tokenizer.model"]
    originals += ["config.json", "mimi_config.json"]
    for name, original in zip(names.values(), originals, strict=True):
        shutil.copy(config.parent / "model" / original, tmp_path / name)
    paths = {f"moshi_paths.{key}": str(tmp_path / name) for key, name in names.items()}
    overrides: dict[str, Any] = {"moshi_paths.hf_repo_id": "null", **paths}
    assert_same_weights(weights(load(config, overrides)), weights(load(config)))
    train(config, tmp_path / "run", {**overrides, "max_steps": 1})


def test_a_named_file_takes_the_place_of_the_one_in_the_folder(
    config: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", num_layers=3)
    model = load(
        config,
        {
            "moshi_paths.config_path": str(other / "config.json"),
            "moshi_paths.moshi_path": str(other / "model.safetensors"),
        },
    )
    assert len(model.transformer.layers) == 3


def test_a_folder_may_say_more_than_the_shape_of_the_model(config: Path, tmp_path: Path) -> None:
    """What the configurations of published models hold besides."""
    shutil.copytree(config.parent / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    extra: dict[str, Any] = {
        "lm_gen_config": {"temp": 0.7},
        "model_id": {"sig": "a"},
        "depformer_causal": True,
    }
    extra |= {"tts_config": {}, "stt_config": {}, "lora": False, "demux_second_stream": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    assert_same_weights(
        weights(load(config, {"moshi_paths.hf_repo_id": str(tmp_path / "model")})),
        weights(load(config)),
    )


def test_the_shape_is_moshi_7b_where_nothing_says_otherwise(config: Path) -> None:
    base = config.parent / "model"
    paths = ModelPaths(
        hf_repo_id=None,
        random_init=True,
        mimi_path=str(base / "mimi.safetensors"),
        tokenizer_path=str(base / "tokenizer.model"),
    )
    from finetune.model import model_shape

    shape = model_shape(find_checkpoint(paths))
    assert (shape["num_layers"], shape["dim"], shape["context"]) == (32, 4096, 3000)
    assert shape.keys() != LM_CONFIG.keys()


def test_weights_under_their_older_names_are_read(config: Path, tmp_path: Path) -> None:
    """The released Moshi has the projections of all steps of the depth transformer in one."""
    folder = tmp_path / "model"
    shutil.copytree(config.parent / "model", folder)
    old = load_file(folder / "model.safetensors")
    layers = {name.split(".self_attn.")[0] for name in old if ".self_attn." in name}
    for layer in layers:
        for kind, name in (("in_projs", "in_proj_weight"), ("out_projs", "out_proj.weight")):
            keys = sorted(key for key in old if key.startswith(f"{layer}.self_attn.{kind}."))
            old[f"{layer}.self_attn.{name}"] = torch.cat([old.pop(key) for key in keys])
    assert "depformer.layers.0.self_attn.in_proj_weight" in old
    save_file(old, folder / "model.safetensors")
    for overrides in ({}, LORA):
        there = {**overrides, "moshi_paths.hf_repo_id": str(folder)}
        assert_same_weights(weights(load(config, there)), weights(load(config, overrides)))
        # So a run may go on with them in place of the others.
        assert fingerprint(config, there) == fingerprint(config, overrides)


def fingerprint(config: Path, overrides: dict[str, Any]) -> str | None:
    args = load_config(config, overrides)
    info = find_checkpoint(args.moshi_paths)
    return frozen_fingerprint(plan_model(args, info), args, info)


def test_random_weights_below_lora_are_those_without_it(config: Path) -> None:
    random: dict[str, Any] = {"moshi_paths.random_init": True}
    plain = dict(load(config, {**FULL, **random}).named_parameters())
    adapted = {
        name.replace(".frozen_W.", "."): parameter
        for name, parameter in load(config, {**LORA, **random}).named_parameters()
        if ".lora_" not in name
    }
    assert_same_weights(plain, adapted)
