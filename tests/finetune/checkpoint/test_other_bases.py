"""A run goes on with the frozen weights that it was trained on, and with no others."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_tools import FULL, LORA, checkpoint, logged, sign, train, trainer

from finetune.checkpoint import earlier_parts_of, load_resume_state
from finetune.config import load_config
from finetune.errors import UserError
from finetune.inference import load_for_inference

LONGER: dict[str, Any] = {"max_steps": 5, "resume": True}


@pytest.fixture
def moved(config: Path, tmp_path: Path) -> Path:
    """A copy of the base model, elsewhere."""
    return shutil.copytree(config.parent / "model", tmp_path / "moved")


def change(file: Path, changed: Callable[[str], bool]) -> None:
    """Train a base further, in place."""
    weights = {k: 1.01 * w if changed(k) else w for k, w in load_file(file).items()}
    save_file(weights, file)


def resume(config: Path, run_dir: Path, **overrides: Any) -> list[float]:
    train(config, run_dir, LONGER | overrides)
    return logged(run_dir)


@pytest.mark.parametrize("options", [LORA, {}], ids=["lora", "ttt alone"])
def test_a_base_may_move_but_not_change(
    config: Path,
    finished_run: Callable[..., Any],
    tmp_path: Path,
    moved: Path,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("same", "other", "precise"):
        finished_run(tmp_path / name, options)
    there: dict[str, Any] = {"moshi_paths.hf_repo_id": str(moved)}
    expected = resume(config, finished_run(tmp_path / "unmoved", options), **options)
    assert resume(config, tmp_path / "same", **options, **there) == expected
    # Neither how the frozen weights are kept makes them others.
    resume(config, tmp_path / "precise", **options, **there, base_precision="nf4")
    assert "base_precision was bfloat16 when" in capsys.readouterr().out

    change(moved / "model.safetensors", lambda name: name.endswith("linear_in.weight"))
    with pytest.raises(UserError) as raised:
        resume(config, tmp_path / "other", **options, **there)
    assert str(raised.value).startswith(
        f"{checkpoint(tmp_path / 'other', 4)} was trained on other frozen weights than these: "
        f"moshi_paths.hf_repo_id was {config.parent / 'model'} when the checkpoint was made, and "
        f"is {moved} now. "
    )
    # In their place, under the same name.
    with pytest.raises(UserError, match="the files that moshi_paths names were replaced"):
        resume(config, tmp_path / "same", **options, **there, max_steps=6)
    # Nor is anything said, measured or exported of what was never trained.
    load_for_inference(checkpoint(tmp_path / "unmoved", 5), "cpu")
    with pytest.raises(UserError, match=r"other frozen weights .* were replaced\. Put back"):
        load_for_inference(checkpoint(tmp_path / "same", 5), "cpu")
    start = {"moshi_paths.init_from": str(checkpoint(tmp_path / "same", 5))}
    with pytest.raises(UserError, match=r"other frozen weights .* were replaced\. Put back"):
        train(config, tmp_path / "next", options | start)


def test_the_same_base_and_data_elsewhere_are_no_other_configuration(
    config: Path, tmp_path: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the data are named from another folder; a base that trains is another one."""
    monkeypatch.chdir(tmp_path)
    data = Path(load_config(config).data.train_data)
    first, then = (
        {"moshi_paths.hf_repo_id": str(base), "data.train_data": named, "data.eval_data": ""}
        for base, named in ((config.parent / "model", str(data)), (moved, os.path.relpath(data)))
    )
    last = {"until_step": 4, "before": {"max_steps": "4"}}
    for name, options, more in (
        ("lora", LORA, {}),
        ("full", FULL, {"moshi_paths.hf_repo_id": str(config.parent / "model")}),
    ):
        train(config, tmp_path / name, options | first)
        resume(config, tmp_path / name, **options, **then)
        expected = last | {"before": last["before"] | more}  # type: ignore[operator]
        assert earlier_parts_of(checkpoint(tmp_path / name, 5)) == [expected]
    other = {"data.train_data": os.path.relpath(data) + ":2"}
    resume(config, tmp_path / "lora", **LORA | then | other, max_steps=6)
    before = earlier_parts_of(checkpoint(tmp_path / "lora", 6))[-1]["before"]
    assert before == {"data.train_data": os.path.relpath(data), "max_steps": "5"}


def test_a_base_that_trains_whole_may_be_another(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path, moved: Path
) -> None:
    finished_run(tmp_path / "run", FULL)
    expected = resume(config, shutil.copytree(tmp_path / "run", tmp_path / "two"), **FULL)
    change(moved / "model.safetensors", lambda name: True)
    there = {"moshi_paths.hf_repo_id": str(moved)}
    assert resume(config, tmp_path / "run", **FULL, **there) == expected


def test_what_an_earlier_run_has_trained_is_part_of_the_base(config: Path, tmp_path: Path) -> None:
    """Embeddings that the earlier run trained beside LoRA are frozen here."""
    options: dict[str, Any] = LORA | {"max_steps": 2, "lora.ft_embed": True, "optim.lr": 0.03}
    for seed in (1, 2):
        train(config, tmp_path / f"start{seed}", options | {"seed": seed})
    first, second = (
        {"moshi_paths.init_from": str(checkpoint(tmp_path / f"start{seed}", 2))} for seed in (1, 2)
    )
    train(config, tmp_path / "run", LORA | first)
    with pytest.raises(UserError, match=r"other frozen weights .*: moshi_paths\.init_from was"):
        resume(config, tmp_path / "run", **LORA, **second)
    assert len(resume(config, tmp_path / "run", **LORA, **first)) == 5


def test_random_weights_go_by_their_seed(config: Path, tmp_path: Path) -> None:
    random: dict[str, Any] = LORA | {"moshi_paths.random_init": True}
    train(config, tmp_path / "run", random)
    with pytest.raises(UserError, match=r"other frozen weights than these: seed was 0 .* is 1 now"):
        resume(config, tmp_path / "run", **random, seed=1)
    with pytest.raises(UserError, match=r"moshi_paths\.random_init was true"):
        resume(config, tmp_path / "run", **LORA)
    with pytest.raises(UserError, match=r"model\.positional_embedding: was null .* is sin now"):
        resume(config, tmp_path / "run", **random, **{"model.positional_embedding": "sin"})
    assert len(resume(config, tmp_path / "run", **random)) == 5

    whole: dict[str, Any] = FULL | {"moshi_paths.random_init": True}
    train(config, tmp_path / "whole", whole)
    assert len(resume(config, tmp_path / "whole", **whole, seed=1)) == 5


def test_a_checkpoint_of_before_there_were_fingerprints_is_resumed(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path, LORA)
    saved = checkpoint(tmp_path, 4)
    state = load_resume_state(saved)
    del state["base"], state["data"]["num_skipped_segments"]
    torch.save(state | {"random": {"cpu": torch.get_rng_state()}}, saved / "resume.pt")
    sign(saved)
    run = trainer(config, tmp_path, LORA | LONGER)
    assert run.step == 4 and run.train() == 0
    assert load_resume_state(checkpoint(tmp_path, 5))["base"]["fingerprint"]
