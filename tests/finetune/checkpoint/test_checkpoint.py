"""What is in checkpoints, what stock `moshi` and this program read in them, and which are kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tools import MIMI_CONFIG
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file
from training_tools import FULL, LORA, PLAIN, checkpoint, random_batch, train, trainer

import finetune.checkpoint.run_record
import finetune.trainer
from finetune.checkpoint import list_checkpoints, load_trained_weights, manifest, step_of
from finetune.checkpoint.run_dir import delete_old
from finetune.checkpoint.run_record import RunRecord
from finetune.config import DataArgs, TrainArgs, load_config
from finetune.errors import UserError
from finetune.kept import require_checkpoint
from finetune.model import find_checkpoint, load_model
from ttt import TTTLMModel

NO_TTT: dict[str, Any] = {"ttt.enabled": False, "param_dtype": "float32"}


def kept_steps(run_dir: Path) -> list[Any]:
    return [step_of(path) for path in list_checkpoints(run_dir)]


@torch.no_grad()
def logits(model: TTTLMModel) -> tuple[Any, Any]:
    """Text and audio logits; NaN where the model has none."""
    output = model.eval()(random_batch())
    return output.text_logits, output.logits


def assert_same_logits(model: TTTLMModel, expected: TTTLMModel, **tolerance: Any) -> None:
    for found, wanted in zip(logits(model), logits(expected), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, **tolerance)


# --- reading checkpoints --------------------------------------------------------------------------


def stock_moshi(config: Path, run_dir: Path, weights: Path, lora: Path | None = None) -> Any:
    """What stock `moshi` builds from a checkpoint and the base's other files."""
    base = config.parent / "model"
    info = CheckpointInfo.from_hf_repo(
        "nobody/nothing",
        moshi_weights=weights,
        mimi_weights=base / "mimi.safetensors",
        tokenizer=base / "tokenizer.model",
        config_path=checkpoint(run_dir, 4) / "consolidated/config.json",
        mimi_config_path=base / "mimi_config.json",
        lora_weights=lora,
    )
    assert info.get_mimi().num_codebooks == 4 and info.get_text_tokenizer().vocab_size() > 0
    return info.get_moshi(device="cpu", dtype=torch.float32)


def test_stock_moshi_loads_a_full_checkpoint(config: Path, tmp_path: Path) -> None:
    run = train(config, tmp_path, PLAIN)
    weights = checkpoint(tmp_path, 4) / "consolidated/consolidated.safetensors"
    stock = stock_moshi(config, tmp_path, weights)
    own = run.model.state_dict()
    assert all(torch.equal(weight, own[key]) for key, weight in stock.state_dict().items())
    # The training path multiplies larger matrices at once, and rounds elsewhere.
    assert_same_logits(stock, run.model, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ft_embed", [False, True])
def test_stock_moshi_loads_adapters(config: Path, tmp_path: Path, ft_embed: bool) -> None:
    run = train(config, tmp_path, {**LORA, **NO_TTT, "optim.lr": 0.03, "lora.ft_embed": ft_embed})
    base = config.parent / "model/model.safetensors"
    adapters = checkpoint(tmp_path, 4) / "consolidated/lora.safetensors"
    found = stock_moshi(config, tmp_path, base, adapters)
    assert_same_logits(found, run.model, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ft_embed", [False, True])
def test_stock_moshi_loads_merged_adapters(config: Path, tmp_path: Path, ft_embed: bool) -> None:
    run = train(
        config,
        tmp_path,
        {**LORA, **NO_TTT, "optim.lr": 0.03, "lora.ft_embed": ft_embed, "save_adapters": False},
    )
    merged = checkpoint(tmp_path, 4) / "consolidated/consolidated.safetensors"
    found = stock_moshi(config, tmp_path, merged)
    assert_same_logits(found, run.model, rtol=1e-4, atol=1e-4)
    unmerged = load_model(run.args, run.checkpoint_info, "cpu")
    assert (logits(unmerged)[0] - logits(found)[0]).abs().max() > 1e-2, "the adapters did nothing"


@pytest.mark.parametrize(
    "overrides",
    [{}, FULL, LORA, {**LORA, "lora.ft_embed": True}, {**LORA, "save_adapters": False}],
    ids=["ttt alone", "full", "lora", "lora and embeddings", "merged lora"],
)
def test_a_checkpoint_gives_back_the_model_with_its_ttt(
    config: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    run = train(config, tmp_path, {**overrides, "param_dtype": "float32", "optim.ttt_lr": 0.1})
    saved = checkpoint(tmp_path, 4)
    args = load_config(saved / "args.yaml")
    model = load_model(args, find_checkpoint(args.moshi_paths), "cpu")
    assert not torch.equal(logits(model)[0], logits(run.model)[0])
    load_trained_weights(model, args, saved)
    merged = not args.save_adapters
    assert_same_logits(model, run.model, rtol=0, atol=1e-4 if merged else 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.popitem(), "it lacks"),
        (lambda weights: weights.update(other=torch.zeros(1)), "it has other"),
        (lambda weights: weights.update({k: w[:1] for k, w in weights.items()}), "has shape"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_weights_of_another_model_are_refused(
    finished_run: Callable[..., Any], tmp_path: Path, spoil: Callable[..., Any], message: str
) -> None:
    finished_run(tmp_path, {"ttt.write": "delta", "ttt.learning_rate": None})
    saved = checkpoint(tmp_path, 4)
    path = saved / "consolidated/ttt.safetensors"
    weights = load_file(path)
    spoil(weights)
    save_file({name: weight.clone() for name, weight in weights.items()}, path)
    args = load_config(saved / "args.yaml")
    model = load_model(args, find_checkpoint(args.moshi_paths), "cpu")
    with pytest.raises(UserError, match=message):
        load_trained_weights(model, args, saved)


def test_another_attention_window_is_in_the_checkpoint(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path, {**PLAIN, "model.attention_context": 7})
    saved = json.loads((checkpoint(tmp_path, 4) / "consolidated/config.json").read_text())
    assert saved["context"] == 7


def test_files_say_what_they_are(finished_run: Callable[..., Any], tmp_path: Path) -> None:
    def files(run_dir: Path, overrides: dict[str, Any]) -> set[Any]:
        finished_run(run_dir, overrides)
        return {file.name for file in (checkpoint(run_dir, 4) / "consolidated").iterdir()}

    described = {"config.json", "mimi_config.json"}
    full, lora, ttt = "consolidated.safetensors", "lora.safetensors", "ttt.safetensors"
    assert files(tmp_path / "full", FULL) == {*described, full, ttt}
    assert files(tmp_path / "lora", LORA) == {*described, lora, ttt}
    assert files(tmp_path / "ttt", {}) == {*described, ttt}
    assert files(tmp_path / "plain", PLAIN) == {*described, full}


def test_mimis_shape_is_there_under_the_name_that_the_checkpoint_has_for_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a repository, with Mimi and the tokenizer added, stock `moshi` loads it by its names."""
    run = train(config, tmp_path / "run", PLAIN)
    folder = checkpoint(tmp_path / "run", 4) / "consolidated"
    base = config.parent / "model"
    assert json.loads((folder / "mimi_config.json").read_text()) == MIMI_CONFIG
    repository = shutil.copytree(folder, tmp_path / "repository")
    for name in ("mimi.safetensors", "tokenizer.model"):
        shutil.copy(base / name, repository)

    def download(repo: str, name: str, revision: str | None = None) -> str:
        assert repo == "me/mine" and (repository / name).is_file(), name
        return str(repository / name)

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", download)
    info = CheckpointInfo.from_hf_repo("me/mine")
    assert info.get_mimi().cardinality == 32
    assert_same_logits(info.get_moshi("cpu", torch.float32), run.model, rtol=0, atol=1e-5)
    # And a run that starts from it needs no more named than is missing.
    paths = {"mimi_path": base / "mimi.safetensors", "tokenizer_path": base / "tokenizer.model"}
    again = {f"moshi_paths.{key}": path for key, path in paths.items()}
    trainer(config, tmp_path / "again", PLAIN | again | {"moshi_paths.hf_repo_id": folder})


@pytest.mark.parametrize("name", ["../mimi_config.json", "consolidated.safetensors", "config.json"])
def test_no_name_in_a_base_writes_over_anything(config: Path, tmp_path: Path, name: str) -> None:
    """Of a base whose Mimi is named by hand, nothing follows the name in its config.json."""
    content = json.loads((config.parent / "model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"mimi_config_name": name}))
    paths = {
        "moshi_paths.config_path": tmp_path / "config.json",
        "moshi_paths.mimi_config_path": config.parent / "model/mimi_config.json",
    }
    train(config, tmp_path / "run", PLAIN | paths)
    saved = checkpoint(tmp_path / "run", 4)
    assert {file.name for file in (saved / "consolidated").iterdir()} == {
        "config.json",
        "consolidated.safetensors",
    }
    assert not (saved / "mimi_config.json").exists()
    assert json.loads((saved / "consolidated/config.json").read_text())["dim"] == content["dim"]
    load_file(saved / "consolidated/consolidated.safetensors")


def test_a_run_can_start_from_the_weights_of_another(config: Path, tmp_path: Path) -> None:
    first = train(config, tmp_path / "first", PLAIN)
    folder = checkpoint(tmp_path / "first", 4) / "consolidated"
    base = config.parent / "model"
    second = trainer(
        config,
        tmp_path / "second",
        {
            **PLAIN,
            "moshi_paths.config_path": folder / "config.json",
            "moshi_paths.moshi_path": folder / "consolidated.safetensors",
            "moshi_paths.hf_repo_id": str(base),
        },
    )
    assert_same_logits(second.model, first.model, rtol=0, atol=0)


# --- which are kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eval_losses, expected",
    [
        ([3.0, 1.0, 2.0, 2.5, 1.5], [2, 4, 5]),
        ([3.0, 2.0, 1.5, 1.2, 1.0], [4, 5]),
        ([float("nan"), 1.0, 2.0, float("nan"), 1.5], [2, 3, 5]),
        (None, [4, 5]),
    ],
    ids=["best is old", "best is last", "some are NaN", "no evaluation"],
)
def test_the_last_checkpoints_and_the_best_are_kept(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eval_losses: list[float] | None,
    expected: list[int],
) -> None:
    overrides: dict[str, Any] = {"max_steps": 5, "ckpt_freq": 1, "num_ckpt_keep": 2}
    if eval_losses:
        overrides |= {"do_eval": True, "eval_freq": 1}
        coming = iter([4.0, *eval_losses])  # the first is from before the first step
        monkeypatch.setattr(
            finetune.trainer,
            "evaluate",
            lambda *args, **options: {
                "loss": next(coming),
                "text_perplexity": 1.0,
                "audio_perplexity": 1.0,
            },
        )
    train(config, tmp_path, overrides)
    assert kept_steps(tmp_path) == expected


def test_all_are_kept_on_request(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path, {"ckpt_freq": 1, "num_ckpt_keep": "null"})
    assert kept_steps(tmp_path) == [1, 2, 3, 4]


def test_the_last_checkpoints_are_those_of_the_last_steps(tmp_path: Path) -> None:
    """From step 1,000,000 on the order of names is another one."""
    record = RunRecord(tmp_path)
    record.create()
    steps = (999998, 999999, 1000000, 1000001)
    for step in steps:
        checkpoint(tmp_path, step).mkdir(parents=True)
        manifest.write(checkpoint(tmp_path, step), {})
        record.add([f"checkpoints/checkpoint_{step:06d}/{manifest.NAME}"])
    assert kept_steps(tmp_path) == [*steps]
    args = TrainArgs(data=DataArgs(), run_dir=str(tmp_path), num_ckpt_keep=2)
    delete_old(args, checkpoint(tmp_path, 1000001), record)
    assert kept_steps(tmp_path) == [1000000, 1000001]
    with pytest.raises(UserError, match=r"Did you mean .*checkpoint_1000001\?"):
        require_checkpoint(tmp_path, "moshi_paths.init_from")


def test_a_checkpoint_that_was_being_deleted_when_the_run_died_is_none(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides: dict[str, Any] = {
        "ckpt_freq": 1,
        "num_ckpt_keep": 1,
        "max_steps": 6,
        "ckpt_async": False,
    }

    def die_half_way(run_dir: Path, units: Any) -> None:
        for file in (run_dir / units[0]).glob("*.*"):
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune.checkpoint.run_record, "delete_units", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path, overrides)
    assert kept_steps(tmp_path) == [2]
    train(config, tmp_path, {**overrides, "resume": True})
    assert kept_steps(tmp_path) == [6]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


# --- secrets --------------------------------------------------------------------------------------


def test_secrets_are_in_no_file(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb")
    overrides: dict[str, Any] = {
        "wandb.project": "p",
        "wandb.offline": True,
        "wandb.key": "s3cr3t" * 7,
    }
    train(config, tmp_path, overrides)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"s3cr3t" in f.read_bytes()]
    info = json.loads((checkpoint(tmp_path, 4) / "info.json").read_text())
    assert info == {"step": 4, "eval_loss": None}
