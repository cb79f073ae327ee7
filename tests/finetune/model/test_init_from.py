"""Starting from an earlier run's weights, and models whose shape the configuration chooses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.modules.transformer import RMSNorm
from safetensors.torch import load_file, save_file
from torch import nn
from training_tools import (
    FULL,
    LORA,
    assert_same_weights,
    checkpoint,
    logged,
    random_batch,
    sign,
    train,
    trainer,
)

from finetune.config import load_config
from finetune.config.args import TrainArgs
from finetune.errors import UserError
from finetune.inference import load_for_inference
from finetune.model import find_checkpoint, load_model, plan_model, trainable_by_role
from finetune.plan.ttt_updates import cautions_of_ttt
from finetune.serve import ExportOptions, export_checkpoint
from finetune.trainer import Trainer
from ttt import TTTLMModel

ROOT = Path(__file__).parents[3]
NO_TTT: dict[str, Any] = {"ttt.enabled": False}


def trained(config: Path, run_dir: Path, overrides: dict[str, Any]) -> tuple[Path, Any]:
    """A short run's checkpoint and its weights."""
    run = train(config, run_dir, {"max_steps": 2, **overrides})
    return checkpoint(run_dir, 2), weights(run.model)


def weights(model: TTTLMModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def start(config: Path, run_dir: Path, init_from: Path | str, overrides: dict[str, Any]) -> Trainer:
    return trainer(config, run_dir, {**overrides, "moshi_paths.init_from": str(init_from)})


@pytest.mark.parametrize("options", [FULL, LORA, LORA | {"lora.ft_embed": True}, {}], ids=str)
def test_all_weights_are_kept_and_nothing_else(
    config: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Base, LoRA and TTT to the bit; optimizer, step and data position are new."""
    earlier, expected = trained(config, tmp_path / "one", options)
    run = start(config, tmp_path / "two", earlier, options)
    assert_same_weights(weights(run.model), expected)
    untouched = trainer(config, tmp_path / "three", options)
    assert trainable_by_role(run.model).keys() == trainable_by_role(untouched.model).keys()
    assert run.step == 0 and not run.optimizer.adamw.state
    assert run.train_data.state_dict() == untouched.train_data.state_dict()
    masters = [m for role in run.optimizer.masters.values() for m in role]
    own = [p.float() for named in trainable_by_role(run.model).values() for p in named.values()]
    assert all(torch.equal(m, p) for m, p in zip(masters, own, strict=True))


@pytest.mark.parametrize("name", ["consolidated", "ttt"])
def test_weights_that_are_not_finite_are_nothing_to_start_from(
    config: Path, tmp_path: Path, name: str
) -> None:
    earlier, _ = trained(config, tmp_path / "one", FULL)
    file = earlier / f"consolidated/{name}.safetensors"
    broken = load_file(file)
    bad = sorted(broken)[-1]
    broken[bad].view(-1)[-1] = float("nan")
    save_file(broken, file)
    sign(earlier)
    with pytest.raises(UserError, match=rf"{name}.safetensors: its {bad} holds NaN or infinity"):
        start(config, tmp_path / "two", earlier, FULL)


def test_ttt_is_added_to_a_base_without_and_changes_nothing_at_first(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window: dict[str, Any] = {"model.attention_context": 4}
    earlier, expected = trained(config, tmp_path / "base", FULL | NO_TTT | window)
    run = start(config, tmp_path / "ttt", earlier, FULL | window)
    assert "TTT is added, untrained" in capsys.readouterr().out
    kept = weights(run.model)
    assert_same_weights({name: kept[name] for name in expected}, expected)
    base, _ = load_for_inference(earlier, "cpu")
    codes = random_batch()
    with torch.no_grad():
        for one, other in zip(_logits(run.model.eval(), codes), _logits(base, codes), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-2)

    assert run.train() == 0
    shutil.rmtree(tmp_path / "base")  # all weights are in the second run's checkpoints
    again, _ = load_for_inference(checkpoint(tmp_path / "ttt", 4), "cpu")
    assert_same_weights(weights(again), weights(run.model))


def _logits(model: TTTLMModel, codes: torch.Tensor) -> list[Any]:
    out = model(codes)
    return [torch.where(out.mask[..., None], out.logits.float(), 0.0)]


def test_a_chain_finds_its_base(config: Path, tmp_path: Path) -> None:
    """All weights, then TTT alone, then LoRA: each checkpoint has only what it trained."""
    first, base = trained(config, tmp_path / "one", FULL | NO_TTT)
    second, with_ttt = trained(config, tmp_path / "two", {"moshi_paths.init_from": str(first)})
    run = start(config, tmp_path / "three", second, LORA)
    merged = {
        name.replace("frozen_W.", ""): weight for name, weight in run.model.named_parameters()
    }
    for name, weight in (base | with_ttt).items():
        assert torch.equal(merged[name], weight), name
    assert all(not weight.any() for name, weight in merged.items() if "lora_B" in name)
    assert run.train() == 0
    third = checkpoint(tmp_path / "three", 4)
    again, _ = load_for_inference(third, "cpu")
    assert_same_weights(weights(again), weights(run.model))
    adapters = ExportOptions(third, tmp_path / "out", form="adapters", device="cpu")
    with pytest.raises(UserError, match=f"adapters are for the weights in {first}.*merged"):
        export_checkpoint(adapters)


def test_embeddings_that_trained_beside_lora_stay_in_a_chain(config: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = LORA | NO_TTT | {"optim.lr": 0.03}
    first, after = trained(config, tmp_path / "one", options | {"lora.ft_embed": True})
    options |= {"moshi_paths.init_from": str(first)}
    second, expected = trained(config, tmp_path / "two", options)
    assert torch.equal(expected["text_emb.weight"], after["text_emb.weight"])
    assert_same_weights(weights(start(config, tmp_path / "three", second, options).model), expected)

    # Adapters and base are the whole model, also for stock Moshi.
    export = ExportOptions(second, tmp_path / "out", form="adapters", device="cpu")
    assert export_checkpoint(export).difference < 0.02
    file = second / "consolidated/lora.safetensors"
    saved = load_file(file)
    assert_same_weights(load_file(tmp_path / "out/lora.safetensors"), saved)
    assert torch.equal(saved["text_emb.weight"], after["text_emb.weight"])

    # As it was once saved.
    save_file({name: weight for name, weight in saved.items() if ".lora_" in name}, file)
    sign(second)
    assert_same_weights(weights(start(config, tmp_path / "four", second, options).model), expected)


def test_resuming_goes_on_where_it_was_and_not_at_the_start(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, _ = trained(config, tmp_path / "one", FULL)
    options = FULL | {"moshi_paths.init_from": str(earlier), "param_dtype": "float32"}
    train(config, tmp_path / "whole", options | {"max_steps": 4})
    half = trainer(config, tmp_path / "half", options | {"max_steps": 4, "ckpt_freq": 2})
    half.train_step()
    half.train_step()
    half.save()
    half.writer.wait()
    half.metrics.close()
    assert f"starting from the weights of {earlier}" in capsys.readouterr().out
    resumed = train(config, tmp_path / "half", options | {"max_steps": 4, "resume": True})
    assert resumed.step == 4
    said = capsys.readouterr().out
    assert "resuming" in said and "starting from the weights" not in said
    assert logged(tmp_path / "half") == logged(tmp_path / "whole")


@pytest.fixture(scope="module")
def with_lora_and_ttt(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config, tmp_path_factory.mktemp("earlier") / "run", LORA)[0]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (LORA | {"ttt.write": "delta"}, r"ttt\.write: is sum in the earlier run, and delta here"),
        (LORA | {"ttt.target": "input"}, r"ttt\.target: is hidden"),
        (LORA | {"ttt.start_layer": 1}, r"ttt\.start_layer: is 0"),
        (LORA | {"ttt.method": "linear"}, r"ttt\.method: is in_place .* linear here"),
        (FULL, r"lora\.enable, .*rank 2 and scaling 2, and this run has no LoRA.*save_adapters"),
        (LORA | {"lora.rank": 3}, r"lora\.rank.*rank 2 .*rank 3"),
        (LORA | {"ttt.target": "input", "ttt.conv_kernel_size": 3}, "has 2 problems"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(
    config: Path, tmp_path: Path, with_lora_and_ttt: Path, overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=f"(?s)init_from.*{named}"):
        start(config, tmp_path / "run", with_lora_and_ttt, overrides)
    assert not (tmp_path / "run").exists()


def test_another_model_is_named_by_what_differs(
    config: Path, tmp_path: Path, with_lora_and_ttt: Path
) -> None:
    args = load_config(config)
    assert args.moshi_paths.hf_repo_id is not None
    shape = json.loads((Path(args.moshi_paths.hf_repo_id) / "config.json").read_text())
    other = tmp_path / "config.json"
    other.write_text(json.dumps(shape | {"num_layers": 1, "positional_embedding": "sin"}))
    overrides = LORA | {"moshi_paths.config_path": str(other)}
    with pytest.raises(UserError) as error:
        start(config, tmp_path / "run", with_lora_and_ttt, overrides)
    assert "num_layers: is 2 in the earlier run, and 1 here" in str(error.value)
    # It has no weights, so nothing else would tell.
    assert "positional_embedding: is rope in the earlier run, and sin here" in str(error.value)


def test_a_run_folder_given_for_a_checkpoint_says_so(
    config: Path, tmp_path: Path, with_lora_and_ttt: Path
) -> None:
    with pytest.raises(UserError, match=f"init_from: .*Did you mean {with_lora_and_ttt}"):
        start(config, tmp_path, with_lora_and_ttt.parent.parent, LORA)
    with pytest.raises(UserError, match=r"init_from, moshi_paths\.moshi_path: both"):
        start(config, tmp_path, "somewhere", {"moshi_paths.moshi_path": "else"})


# --- exported models ------------------------------------------------------------------------------


def exported(run_dir: Path, out: Path, form: Any = "merged") -> Path:
    export_checkpoint(ExportOptions(checkpoint(run_dir, 2), out, form=form, device="cpu"))
    return out


@pytest.mark.parametrize("ft_embed", [True, False])
def test_exported_adapters_train_further_with_their_ttt(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ft_embed: bool
) -> None:
    _, expected = trained(config, tmp_path / "one", LORA | {"lora.ft_embed": ft_embed})
    out = exported(tmp_path / "one", tmp_path / "out", "adapters")
    shutil.rmtree(tmp_path / "one")
    run = start(config, tmp_path / "two", out, LORA)
    assert f"starting from the weights of {out}; its TTT goes on" in capsys.readouterr().out
    assert_same_weights(weights(run.model), expected)
    assert run.train() == 0
    again, _ = load_for_inference(checkpoint(tmp_path / "two", 4), "cpu")
    assert_same_weights(weights(again), weights(run.model))
    assert any(not torch.equal(expected[name], weight) for name, weight in weights(again).items())


@pytest.mark.parametrize("options", [FULL, LORA, {}], ids=str)
def test_a_merged_export_trains_further_with_its_ttt(
    config: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    trained(config, tmp_path / "one", LORA)
    out = exported(tmp_path / "one", tmp_path / "out")
    expected = load_file(out / "model.safetensors") | load_file(out / "ttt.safetensors")
    run = start(config, tmp_path / "two", out, options)
    found = {name.replace("frozen_W.", ""): w for name, w in run.model.named_parameters()}
    assert_same_weights({name: found[name].detach() for name in expected}, expected)
    assert run.train() == 0
    again, _ = load_for_inference(checkpoint(tmp_path / "two", 4), "cpu")
    assert_same_weights(weights(again), weights(run.model))


def test_what_does_not_fit_an_export_is_named(
    config: Path, tmp_path: Path, with_lora_and_ttt: Path
) -> None:
    run_dir = with_lora_and_ttt.parent.parent
    out = exported(run_dir, tmp_path / "out", "adapters")
    for overrides, named in (
        (LORA | {"ttt.write": "delta"}, r"ttt\.write: is sum in the earlier run, and delta here"),
        (FULL, "rank 2 and scaling 2, and this run has no LoRA.*--form merged"),
        (LORA | {"moshi_paths.hf_repo_id": str(out)}, "LoRA adapters alone.*moshi_paths.init_from"),
    ):
        with pytest.raises(UserError, match=f"(?s){named}"):
            start(config, tmp_path / "run", out, overrides)
    (out / "lora.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"init_from: the config\.json of .* speaks of adapters"):
        start(config, tmp_path / "run", out, LORA)
    merged = exported(run_dir, tmp_path / "merged")
    (merged / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 'model\.safetensors' as the file of its weights"):
        start(config, tmp_path / "run", merged, FULL)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_base_whose_ttt_is_left_out_is_named(
    config: Path, tmp_path: Path, with_lora_and_ttt: Path, enabled: bool
) -> None:
    out = exported(with_lora_and_ttt.parent.parent, tmp_path / "out")
    merged, _ = trained(config, tmp_path / "merged", LORA | {"save_adapters": False})
    file = merged / "consolidated/consolidated.safetensors"
    for overrides, place in (
        ({"moshi_paths.hf_repo_id": out}, out),
        ({"moshi_paths.moshi_path": str(file)}, merged),
        ({"moshi_paths.hf_repo_id": out, "moshi_paths.init_from": out}, None),
        ({}, None),
    ):
        args = load_config(config, {**FULL, "ttt.enabled": enabled, **overrides})
        model = plan_model(args, find_checkpoint(args.moshi_paths))
        text = " ".join(cautions_of_ttt(args, model, None, None))
        assert ("holds the TTT that these weights were trained with" in text) == bool(place)
        assert place is None or f"set moshi_paths.init_from: {place}" in text
        assert place is None or ("its own is off" in text) != enabled


def test_the_shipped_model_trains_further_with_its_ttt(config: Path, tmp_path: Path) -> None:
    memory = ROOT / "example/memory"
    overrides: dict[str, Any] = {
        "moshi_paths.hf_repo_id": str(memory), "moshi_paths.init_from": str(memory),
        "ttt.write": "delta", "ttt.learning_rate": None, "ttt.target": "hidden",
        "ttt.start_layer": 1, "ttt.layer_frequency": 2, "ttt.chunk_size": 32,
    }  # fmt: skip
    args = load_config(config, overrides)
    model = load_model(args, find_checkpoint(args.moshi_paths), "cpu")
    expected = load_file(memory / "ttt.safetensors")
    del overrides["moshi_paths.hf_repo_id"]
    with pytest.raises(UserError, match=f"own shape: set moshi_paths.hf_repo_id: {memory} too"):
        start(config, tmp_path / "run", memory, overrides)
    assert_same_weights({name: weights(model)[name] for name in expected}, expected)


# --- norm, gating, positions ----------------------------------------------------------------------

STACKS = [
    {"model.norm": norm, "model.gating": gating, "model.positional_embedding": positions}
    for norm in ("layer_norm", "rms_norm_f32")
    for gating in ("none", "silu")
    for positions in ("sin", "rope")
]


def demo_args(**overrides: Any) -> TrainArgs:
    return load_config(ROOT / "example/demo.yaml", {**NO_TTT, **overrides})


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "-".join(stack.values()))
def test_no_linear_layer_has_a_bias_and_gates_cost_no_parameters(stack: dict[str, str]) -> None:
    args = demo_args(**stack)
    model = plan_model(args, find_checkpoint(args.moshi_paths))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 30 and all(module.bias is None for module in linear)
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert all("norm" in name for name in biases)
    assert bool(biases) == (stack["model.norm"] == "layer_norm")
    transformer = model.transformer
    assert all((x.gating is None) == (stack["model.gating"] == "none") for x in transformer.layers)
    assert (transformer.rope is None) == (stack["model.positional_embedding"] == "sin")
    kind = nn.LayerNorm if stack["model.norm"] == "layer_norm" else RMSNorm
    assert all(isinstance(x.norm1, kind) for x in transformer.layers)

    other = {"none": "silu", "silu": "none"}[stack["model.gating"]]
    twin = plan_model(
        demo_args(**stack | {"model.gating": other}), find_checkpoint(args.moshi_paths)
    )
    assert _count(twin) == _count(model)


def _count(model: TTTLMModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_chosen_shape_is_saved_and_needs_random_weights(config: Path, tmp_path: Path) -> None:
    stack = STACKS[0]
    with pytest.raises(UserError, match="has 3 problems") as error:
        load_config(config, FULL | NO_TTT | stack)
    assert "model.gating, moshi_paths.random_init: trained weights" in str(error.value)

    random = FULL | NO_TTT | {"moshi_paths.random_init": True, "max_steps": 2}
    run = train(config, tmp_path / "run", random | stack)
    saved = checkpoint(tmp_path / "run", 2)
    shape = json.loads((saved / "consolidated/config.json").read_text())
    assert {key: shape[key.removeprefix("model.")] for key in stack} == stack
    assert shape["depformer_gating"] == "silu"
    model, _ = load_for_inference(saved, "cpu")
    assert_same_weights(weights(model), weights(run.model))
    # And a run that starts from it must be of the same shape.
    with pytest.raises(UserError, match=r"model\.positional_embedding: is sin in the earlier run"):
        changed = stack | {"model.positional_embedding": "rope"}
        start(config, tmp_path / "two", saved, random | changed)


def test_a_plain_mlp_leaves_linear_ttt_but_not_in_place() -> None:
    plain: dict[str, Any] = {"model.gating": "none", "ttt.enabled": True}
    with pytest.raises(UserError, match=r"model\.gating, ttt\.method: .*set ttt.method to linear"):
        demo_args(**plain)
    args = demo_args(**plain | {"ttt.method": "linear", "ttt.mini_batch_size": 8})
    model = load_model(args, find_checkpoint(args.moshi_paths), "cpu")
    assert list(model.ttt_layers) == [1, 3]
