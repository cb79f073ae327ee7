"""What others load: stock `moshi`, and `moshi-ttt` with the TTT beside it."""

import dataclasses
import json
import shutil
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from data_tools import write_dataset, write_jsonl
from moshi.models import loaders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_tools import LORA, PLAIN, checkpoint, random_batch, train

from finetune.config import DataArgs, TrainArgs
from finetune.errors import UserError
from finetune.inference import load_for_inference
from finetune.serve import ExportOptions, export_checkpoint
from finetune.serve.card import model_card
from finetune.serve.export import _push
from ttt import TTTArgs, TTTLMModel, ttt_parameters, without_ttt


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(
    request: pytest.FixtureRequest, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("export") / "run"
    how = {"full_finetuning": True} if request.param == "full" else LORA
    train(config, run_dir, {"max_steps": 2, "param_dtype": "float32", **how})
    return checkpoint(run_dir, 2)


def card_of(args: TrainArgs, checkpoint: Path) -> str:
    names = {"mimi_name": "mimi.safetensors", "tokenizer_name": "tokenizer.model"}
    return model_card(args, ExportOptions(checkpoint, checkpoint / "out"), names)


def stock(folder: Path, **places: Any) -> Any:
    info = loaders.CheckpointInfo.from_hf_repo(
        "none",
        config_path=folder / "config.json",
        mimi_weights=folder / "mimi.safetensors",
        tokenizer=folder / "tokenizer.model",
        mimi_config_path=folder / "mimi_config.json",
        **places,
    )
    assert info.get_text_tokenizer().vocab_size() > 0
    return info.get_moshi(dtype=torch.float32)


@torch.no_grad()
def text_logits(model: TTTLMModel) -> torch.Tensor:
    out = model(random_batch())
    return torch.cat([out.text_logits[out.text_mask].flatten(), out.logits[out.mask].flatten()])


def test_stock_moshi_computes_the_model_without_ttt(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = export_checkpoint(ExportOptions(trained, out, device="cpu"))
    assert done.difference < 1e-6
    ours, _ = load_for_inference(trained, "cpu")
    theirs = stock(out, moshi_weights=out / "model.safetensors")
    with without_ttt(ours):
        torch.testing.assert_close(text_logits(theirs), text_logits(ours), atol=1e-5, rtol=0)
    names = {path.name for path in done.files}
    assert {"README.md", "config.json", "model.safetensors", "ttt.safetensors"} <= names
    card = (out / "README.md").read_text()
    assert "Stock `moshi` cannot run test-time training" in card and "license:" in card
    assert str(tmp_path) not in card and str(trained.parents[2]) not in card

    again, _ = load_for_inference(out, "cpu")
    for name, weight in ttt_parameters(ours).items():
        # On a CPU nothing is rounded to bfloat16.
        assert torch.equal(ttt_parameters(again)[name], weight)
    assert again.ttt_args == ours.ttt_args
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(ExportOptions(trained, out, device="cpu"))


@pytest.mark.parametrize("method", ["in_place", "linear", "mlp"])
def test_an_export_from_when_text_was_the_target_is_the_same_model(
    config: Path, tmp_path: Path, method: str
) -> None:
    """All methods wrote it down, also those that have no targets."""
    rule = {"ttt.target": "text"} if method == "in_place" else {"ttt.method": method}
    # On a CPU an export is read in float32.
    how = {"max_steps": 1, "full_finetuning": True, "param_dtype": "float32"}
    train(config, tmp_path / "run", how | rule)
    last = checkpoint(tmp_path / "run", 1)
    out = tmp_path / "model"
    export_checkpoint(ExportOptions(last, out, device="cpu"))
    with safe_open(out / "ttt.safetensors", "pt") as file:
        written = json.loads(file.metadata()["ttt_args"]) | {"target": "text"}
    weights = load_file(out / "ttt.safetensors")
    save_file(weights, out / "ttt.safetensors", metadata={"ttt_args": json.dumps(written)})
    (out / "manifest.json").unlink()  # there was none then
    again, _ = load_for_inference(out, "cpu")
    ours, _ = load_for_inference(last, "cpu")
    assert again.ttt_args == ours.ttt_args
    assert again.ttt_args.target == ("text" if method == "in_place" else "hidden")
    torch.testing.assert_close(text_logits(again), text_logits(ours))


def test_an_export_of_a_control_run_sees_as_little_as_the_run(config: Path, tmp_path: Path) -> None:
    """`ttt.attention_context` counts without TTT as well, and stock `moshi` does not know it."""
    narrow = {"max_steps": 1, "ttt.attention_context": 4, "ttt.start_layer": 1, **PLAIN}
    train(config, tmp_path / "run", narrow)
    last, out = checkpoint(tmp_path / "run", 1), tmp_path / "model"
    assert export_checkpoint(ExportOptions(last, out, device="cpu")).difference < 1e-6
    ours, _ = load_for_inference(last, "cpu")
    again, _ = load_for_inference(out, "cpu")
    torch.testing.assert_close(text_logits(again), text_logits(ours))
    assert "with 4 in some" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("evaluated", "said"),
    [
        ("eval", "loss on held-out recordings: 0.500 nats"),
        ("train", "loss on recordings that it was trained on: 0.500 nats"),
        ("twice", "loss on recordings that it was trained on: 0.500 nats"),
        ("mixed", "loss on 2 recordings, 1 trained on: 0.500 nats"),
        ("moved", "loss on recordings of which this export cannot see whether it was trained on"),
    ],
)
def test_the_card_says_held_out_of_no_other_recordings(
    tmp_path: Path, evaluated: str, said: str
) -> None:
    train = write_dataset(tmp_path / "train", [1.0, 1.0])
    mixed = [{"path": path, "duration": 1.0} for path in ("train/1.wav", "eval/0.wav")]
    (tmp_path / "link").symlink_to(tmp_path / "train")
    twice = [{"path": f"{folder}/0.wav", "duration": 1.0} for folder in ("train", "link")]
    paths = {
        "train": train,
        "twice": write_jsonl(tmp_path / "twice.jsonl", twice),
        "eval": write_dataset(tmp_path / "eval", [1.0], seed=5),
        "mixed": write_jsonl(tmp_path / "mixed.jsonl", mixed),
        "moved": tmp_path / "moved.jsonl",
    }
    (tmp_path / "info.json").write_text(json.dumps({"step": 2, "eval_loss": 0.5}))
    data = DataArgs(train_data=str(train), eval_data=str(paths[evaluated]))
    card = card_of(TrainArgs(data=data, run_dir=""), tmp_path)
    assert said in card and str(tmp_path) not in card
    assert "An earlier training" not in card

    # What trained it until it was resumed is no longer in its configuration.
    part = {"until_step": 1, "before": {"data.train_data": "elsewhere.jsonl"}}
    info = {"step": 2, "eval_loss": 0.5, "earlier_parts": [part]}
    (tmp_path / "info.json").write_text(json.dumps(info))
    card = card_of(TrainArgs(data=data, run_dir=""), tmp_path)
    assert "held-out" not in card and "An earlier training may have had others" in card


def test_the_card_of_a_run_without_an_evaluation_names_no_loss(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text(json.dumps({"step": 2, "eval_loss": None}))
    card = card_of(TrainArgs(data=DataArgs(train_data="a.jsonl"), run_dir=""), tmp_path)
    assert "Step 2; its loss was not measured." in card
    assert "Others were" not in card


def test_the_card_names_the_settings_that_were_others_before(tmp_path: Path) -> None:
    parts = [
        {"until_step": 2, "before": {"optim.lr": "0.1", "data.train_data": "/home/me/a.jsonl"}},
        {"until_step": 3, "before": {"seed": "5"}},
    ]
    info = {"step": 4, "eval_loss": None, "earlier_parts": parts}
    (tmp_path / "info.json").write_text(json.dumps(info))
    args = TrainArgs(data=DataArgs(train_data="a.jsonl"), run_dir="")
    card = card_of(args, tmp_path)
    assert (
        "These settings are of the end. Others were until step 2 `optim.lr`, `data.train_data`; "
        "until step 3 `seed`."
    ) in card
    assert "/home/me" not in card


@pytest.mark.parametrize(
    ("method", "read", "foreign"),
    [
        ("mlp", {"mini_batch_size", "base_lr", "num_heads"}, {"chunk_size", "write", "target"}),
        ("in_place", {"chunk_size", "write", "target"}, {"mini_batch_size", "use_rope"}),
    ],
)
def test_the_card_has_the_options_of_its_method_alone(
    tmp_path: Path, method: str, read: set[str], foreign: set[str]
) -> None:
    args = TrainArgs(DataArgs(), "", ttt=TTTArgs(enabled=True, method=method))
    card = card_of(args, tmp_path)
    settings = json.loads(card.split("```json\n")[1].split("```")[0])["ttt"]
    assert settings["method"] == method and settings["layer_frequency"] == 6
    assert settings.keys() >= read and not settings.keys() & foreign


def test_adapters_alone(
    trained: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapters"
    options = ExportOptions(trained, out, form="adapters", device="cpu")
    if not (trained / "consolidated/lora.safetensors").is_file():
        with pytest.raises(UserError, match="holds no adapters"):
            export_checkpoint(options)
        return
    assert export_checkpoint(options).difference < 1e-6
    assert not (out / "model.safetensors").exists()
    ours, _ = load_for_inference(trained, "cpu")
    base = config.parent / "model/model.safetensors"
    theirs = stock(out, moshi_weights=base, lora_weights=out / "lora.safetensors")
    with without_ttt(ours):
        torch.testing.assert_close(text_logits(theirs), text_logits(ours), atol=1e-5, rtol=0)
    size = sum(path.stat().st_size for path in out.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.95 * size))
    with pytest.raises(UserError, match=r"again takes .* are free on its disk"):
        export_checkpoint(dataclasses.replace(options, out=tmp_path / "again"))


def test_adapters_on_random_weights_are_refused_before_a_folder_is_made(
    trained: Path, tmp_path: Path
) -> None:
    last, out = tmp_path / "checkpoint_000002", tmp_path / "adapters"
    shutil.copytree(trained, last)
    args = yaml.safe_load((last / "args.yaml").read_text())
    args["moshi_paths"]["random_init"] = True
    args |= {"full_finetuning": False, "save_adapters": True}
    args["lora"]["enable"] = True
    (last / "args.yaml").write_text(yaml.safe_dump(args))
    with pytest.raises(UserError, match="these adapters are for random weights"):
        export_checkpoint(ExportOptions(last, out, form="adapters", device="cpu"))
    assert not out.exists()


def test_a_push_that_fails_leaves_the_export(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    pushed: list[Any] = []

    class Hub:
        def create_repo(self, repo: Any, **how: Any) -> None:
            pushed.append((repo, how))

        def repo_info(self, repo: Any) -> Any:
            return types.SimpleNamespace(private=repo != "me/known")

        def upload_folder(self, **how: Any) -> None:
            if len(pushed) > 1:
                raise ConnectionError("no network")
            pushed.append(how)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export_checkpoint(ExportOptions(trained, tmp_path / "one", push="me/moshi", device="cpu"))
    assert pushed[0] == ("me/moshi", {"private": True, "exist_ok": True})
    assert pushed[1] == {"repo_id": "me/moshi", "folder_path": tmp_path / "one"}
    with pytest.raises(UserError, match=r"^--push: me/known is public"):
        _push(tmp_path / "one", "me/known")
    assert [each.get("repo_id") for each in pushed if isinstance(each, dict)] == ["me/moshi"]
    with pytest.raises(UserError, match="--push: me/moshi was not written"):
        export_checkpoint(ExportOptions(trained, tmp_path / "two", push="me/moshi", device="cpu"))
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert config["moshi_name"] == "model.safetensors"
