"""The programs of `research/` still do what they did; each is run as its README says, on little."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.demo import make_dialogues
from finetune.recall.presets import preset
from research import recall_study as study
from ttt import TTTLMModel

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "example/demo/model"


def run(program: str, *words: Any) -> str:
    """Start one of the programs; returns what it has printed."""
    done = subprocess.run(
        [sys.executable, f"research/{program}.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_program_is_explained() -> None:
    text = (ROOT / "research/README.md").read_text()
    assert all(f"`{path.name}`" in text for path in (ROOT / "research").glob("*.py"))


def test_a_cell_of_the_study_is_trained_as_its_row_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "NUM_STEPS", 2)
    monkeypatch.setattr(study, "NUM_EVAL", 8)
    built, build_one = [], study.new_model

    def spy(*args: Any, **options: Any) -> TTTLMModel:
        model = build_one(*args, **options)
        layer = next(iter(model.ttt_layers.values()))
        built.append((model, model.text_emb.weight.std().item(), layer))
        return model

    monkeypatch.setattr(study, "new_model", spy)
    forms = ["sum, none, η 0.1", "delta, relative"]
    chosen = study.cells(stds=[0.14], widths=[16, 32], chunk_sizes=[64], forms=forms)
    results = study.run_study(chosen, tmp_path, device=torch.device("cpu"), workers=1)
    assert len(built) == len(chosen) == 4
    for cell, (model, embedding, layer) in zip(chosen, built, strict=True):
        assert model.dim == cell.width and abs(embedding - 0.14) < 0.02
        assert layer.args.chunk_size == 64
        form = (layer.args.write, layer.args.lr_scale, layer.args.inner_learning_rate)
        assert form[:2] == (("sum", "none") if cell.form == forms[0] else ("delta", "relative"))
        assert cell.form != forms[0] or form[2] == 0.1
    table = "\n".join(study.study_table(results))
    assert all(form in table for form in forms)
    assert "| 16 | 0.14 | 64 |" in table and "| 32 | 0.14 | 64 |" in table


def test_keys_are_told_apart_where_embeddings_are_large(tmp_path: Path) -> None:
    first, *_ = study.key_match(1.0, 16).values()
    small, *_ = study.key_match(0.02, 16).values()
    assert first[0] > first[1] + 0.3 and first[2] > 0.7 > small[2] + 0.2
    assert study.keys_report(tmp_path, widths=[16]).count("| 16 |") == 3


@pytest.mark.parametrize(("width", "heads"), [(17, 4), (328, 5)])
def test_a_width_without_heads_is_named_before_anything_is_done(
    width: int,
    heads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["scale", f"--widths={width}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["recall_study.py", *words])
    assert study.main() == 1 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert f"{width} cannot be divided into {heads} heads of an even size" in message


@pytest.mark.slow
def test_the_study_of_keys_runs_as_a_program(tmp_path: Path) -> None:
    printed = run("recall_study", "keys", "--widths=16", f"--out={tmp_path}")
    assert printed.count("| 16 |") == 3 and (tmp_path / "report.md").is_file()


@pytest.mark.slow
def test_the_study_of_scales_is_told_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "NUM_STEPS", 2)
    monkeypatch.setattr(study, "NUM_EVAL", 8)
    chosen = study.cells(widths=[16], stds=[1.0], chunk_sizes=[64])
    monkeypatch.setattr(study, "cells", lambda **_: chosen)
    where: dict[str, Any] = {"widths": [16], "seeds": [0], "device": "cpu", "workers": 1}
    report = study.scale_report(tmp_path, **where)
    assert all(form in report for form in study.FORMS) and "(chance 0.0" in report


@pytest.mark.slow
def test_the_oracle_measures_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from research import rls_oracle

    small = dataclasses.replace(preset("cpu"), num_steps=2, batch_size=2, num_eval=4)
    monkeypatch.setattr(rls_oracle, "preset", lambda _: small)
    words = [
        "--rules=delta,exact:0,rank4:0.1,diagonal:0,forget:0.9",
        "--lengths=2",
        "--sequences=1",
    ]
    monkeypatch.setattr(sys, "argv", ["rls_oracle.py", f"--out={tmp_path}", *words])
    rls_oracle.main()
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [r["rule"] for r in results] == words[0].removeprefix("--rules=").split(",")
    assert all(0 <= value[0] <= 1 for r in results for value in r["accuracy"].values() if value)


@pytest.mark.slow
def test_voices_are_told_apart_by_how_they_are_understood() -> None:
    said = run("recall_voices", "--talks=3", "--voices", "en-us+f2", "en-us+m7")
    good, bad = (line.split(" | ") for line in said.splitlines()[-2:])
    assert good[0] == "| en-us+f2" and good[1] == bad[1] == "12"
    assert float(good[2]) >= 0.75 and float(bad[2]) <= 0.5


@pytest.mark.slow
def test_the_tokenizer_of_the_demonstration_is_what_its_program_makes(tmp_path: Path) -> None:
    run("train_tokenizer", "--out", tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (MODEL / "tokenizer.model").read_bytes()


@pytest.mark.slow
def test_a_mimi_is_trained_and_trained_further(tmp_path: Path) -> None:
    make_dialogues(
        tmp_path / "data", num_dialogues=2, min_sec=6, max_sec=8, eval_fraction=0.5, seed=3
    )
    shutil.copy(MODEL / "mimi_config.json", tmp_path)
    quick = ["--data", tmp_path / "data", "--minutes", 0.05, "--batch-size", 2]
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run("train_mimi", *quick, "--out", first)
    printed = run("train_mimi", *quick, "--start-from", first, "--out", second)
    measured = json.loads(printed.strip().splitlines()[-1])
    assert len(measured["bits_per_codebook"]) == 8 and measured["mel_loss"] > 0
    assert second.stat().st_size == (MODEL / "mimi.safetensors").stat().st_size


def test_the_shipped_model_is_laid_out_from_the_weights_of_an_experiment(tmp_path: Path) -> None:
    shipped = ROOT / "example/memory"
    weights = load_file(shipped / "model.safetensors") | load_file(shipped / "ttt.safetensors")
    for folder in ("runs", "data"):
        (tmp_path / folder).mkdir()
    save_file(weights, tmp_path / "runs" / "delta_hidden_seed2.model.safetensors")
    shutil.copyfile(shipped / "tokenizer.model", tmp_path / "data" / "tokenizer.model")
    run("memory_model", "--runs", tmp_path, "--seed", 2, "--out", tmp_path / "model")
    made = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert made == {path.name: path.read_bytes() for path in shipped.iterdir() if path.name in made}
    assert {path.name for path in shipped.iterdir()} - set(made) == {"README.md"}
