"""How a run goes on from a checkpoint, also from one that is damaged or did not fit on the disk."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import (
    FULL,
    LORA,
    PLAIN,
    assert_same_weights,
    checkpoint,
    logged,
    logged_steps,
    saved_weights,
    stop_after,
    train,
    trainer,
)

import finetune.evaluation
import finetune.trainer
from finetune.checkpoint import RunFolder, earlier_parts_of, eval_loss_of, manifest
from finetune.checkpoint.run_record import RunRecord
from finetune.config import DataArgs, TrainArgs
from finetune.distributed import World
from finetune.errors import UserError
from finetune.monitoring import metrics_path, read_metrics
from finetune.plan import SUMMARY

# --- resuming -------------------------------------------------------------------------------------


def test_a_checkpoint_tells_which_configurations_its_training_had_before(
    config: Path, tmp_path: Path
) -> None:
    """What changes no weight is none of it, and an evaluation that comes later loses nothing."""
    train(config, tmp_path, {"max_steps": 2})
    assert earlier_parts_of(checkpoint(tmp_path, 2)) == []
    train(config, tmp_path, {"max_steps": 4, "resume": True, "log_freq": 2, "optim.lr": 0.01})
    first = {"until_step": 2, "before": {"max_steps": "2", "optim.lr": "0.003"}}
    assert earlier_parts_of(checkpoint(tmp_path, 4)) == [first]
    more = {"max_steps": 5, "resume": True, "optim.lr": 0.01}
    train(config, tmp_path, more)
    second = {"until_step": 4, "before": {"max_steps": "4"}}
    assert earlier_parts_of(checkpoint(tmp_path, 5)) == [first, second]
    train(config, tmp_path, more | {"do_eval": True, "health_sec": 0, "seed": 7})
    assert eval_loss_of(checkpoint(tmp_path, 5)) is not None
    assert earlier_parts_of(checkpoint(tmp_path, 5)) == [first, second]
    assert manifest.first_problem(checkpoint(tmp_path, 5)) is None


SIX_STEPS: dict[str, Any] = {"max_steps": 6, "ckpt_freq": 3}


@pytest.mark.parametrize(
    "overrides",
    [
        # Each of the others has what these have: float32, and adapters.
        pytest.param(PLAIN, marks=pytest.mark.slow),
        pytest.param(LORA, marks=pytest.mark.slow),
        {**LORA, "lora.ft_embed": True, "save_adapters": False, "param_dtype": "float32"},
        {"data.num_workers": 2, "num_microbatches": 2},
        {**FULL, "gradient_checkpointing": True, "data.shuffle": False},
    ],
    ids=["float32", "lora", "merged lora and embeddings", "micro-batches", "checkpointing"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    config: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    overrides = {**SIX_STEPS, **overrides}
    train(config, tmp_path / "whole", overrides)
    stop_after(trainer(config, tmp_path / "cut", overrides), 5)
    assert logged_steps(tmp_path / "cut") == [1, 2, 3, 4, 5]
    resumed = train(config, tmp_path / "cut", {**overrides, "resume": True})
    assert resumed.step == 6
    assert logged_steps(tmp_path / "cut") == list(range(1, 7))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert_same_weights(saved_weights(tmp_path / "cut", 6), saved_weights(tmp_path / "whole", 6))


def test_options_changed_on_resuming_take_effect(config: Path, tmp_path: Path) -> None:
    """A run that was stopped after step 5 goes on from step 3 with other options."""
    stop_after(trainer(config, tmp_path / "cut", {**SIX_STEPS, **FULL}), 5)
    whole: dict[str, Path] = {}
    for name, later in {
        "same": {},
        "lr": {"optim.lr": 6e-3},
        "max_norm": {"max_norm": 1e-6},
        "weight_decay": {"optim.weight_decay": 1.0},
    }.items():
        whole[name] = shutil.copytree(tmp_path / "cut", tmp_path / name)
        train(config, whole[name], {**SIX_STEPS, **FULL, **later, "resume": True})
    rates, new_rates = logged(whole["same"], "lr"), logged(whole["lr"], "lr")
    assert new_rates[:3] == rates[:3]
    assert new_rates[3:5] == pytest.approx([2 * rate for rate in rates[3:5]])
    weights = {name: saved_weights(run, 6)["text_linear.weight"] for name, run in whole.items()}
    for name in ("lr", "max_norm", "weight_decay"):
        assert logged(whole[name])[:4] == logged(whole["same"])[:4]
        assert not torch.equal(weights[name], weights["same"]), name


def test_a_resumed_run_can_be_longer(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path, SIX_STEPS)
    run = train(config, tmp_path, {**SIX_STEPS, "max_steps": 8, "resume": True})
    assert run.step == 8
    assert logged_steps(tmp_path) == list(range(1, 9))


def test_a_resumed_run_that_is_complete_does_nothing(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path, SIX_STEPS)
    before = saved_weights(tmp_path, 6)
    train(config, tmp_path, {**SIX_STEPS, "resume": True})
    assert_same_weights(saved_weights(tmp_path, 6), before)
    assert logged_steps(tmp_path) == list(range(1, 7))


def test_a_complete_run_keeps_the_files_that_say_how_it_was_made(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path, SIX_STEPS)
    files = [tmp_path / "args.yaml", tmp_path / SUMMARY]
    before = [file.read_bytes() for file in files]
    train(config, tmp_path, {**SIX_STEPS, "optim.lr": 1.0, "batch_size": 1, "resume": True})
    assert [file.read_bytes() for file in files] == before
    train(config, tmp_path, {**SIX_STEPS, "max_steps": 7, "batch_size": 1, "resume": True})
    assert "batch_size: 1\n" in files[0].read_text()  # it has trained with it


def test_a_run_resumed_with_fewer_steps_than_it_has_made_is_refused(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path, SIX_STEPS)
    with pytest.raises(UserError) as raised:
        trainer(config, tmp_path, {**SIX_STEPS, "max_steps": 4, "resume": True})
    made = checkpoint(tmp_path, 6)
    assert str(raised.value) == (
        f"{made} does not belong to this configuration: it was saved after step 6, and max_steps "
        f"is 4. Resume with the configuration in {made / 'args.yaml'}, or start a new run_dir."
    )


@pytest.mark.parametrize(
    ("other", "changed"),
    [
        (FULL, ["full_finetuning: was false", "lora.enable: was true"]),
        ({"lora.rank": 4}, ["lora.rank: was 2"]),
        ({"lora.scaling": 20}, ["lora.scaling: was 2.0"]),
        ({"lora.ft_embed": True}, ["lora.ft_embed: was false"]),
        ({"ttt.enabled": False}, ["ttt.enabled: was true"]),
        ({"optim.state": "int8"}, ["optim.state: was float32"]),
        ({"ttt.start_layer": 1}, ["ttt.start_layer: was 0"]),
        ({"ttt.conv_kernel_size": 3}, ["ttt.conv_kernel_size: was 2"]),
        ({"ttt.write": "delta"}, ["ttt.write: was sum"]),
        ({"ttt.chunk_edge": "cut"}, ["ttt.chunk_edge: was carry"]),
        ({"ttt.method": "mlp", "ttt.mini_batch_size": 5}, ["ttt.method: was in_place"]),
    ],
)
def test_a_run_is_not_resumed_with_other_parameters_and_the_key_is_named(
    config: Path,
    finished_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, Any],
    changed: list[str],
) -> None:
    finished_run(tmp_path, LORA)
    # Before the base model is fetched: it may be large.
    monkeypatch.setattr("finetune.trainer.find_checkpoint", lambda paths: pytest.fail("too late"))
    off = {"lora.enable": False} if other is FULL else {}
    with pytest.raises(UserError) as raised:
        trainer(config, tmp_path, {**LORA, **other, **off, "resume": True})
    heading, *lines = str(raised.value).splitlines()
    made = checkpoint(tmp_path, 4)
    assert heading.startswith(f"resuming {made}, made with {made / 'args.yaml'}, has ")
    for line, start in zip(lines, changed, strict=True):
        assert line.startswith(f"  - {start} when the checkpoint was made, and is ")
        assert line.endswith(f"; set it to {start.split()[-1]}, or start a new run_dir")


def test_resume_auto_starts_anew_where_there_is_nothing_and_goes_on_where_there_is(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {**SIX_STEPS, "resume": "auto"}
    stop_after(trainer(config, tmp_path / "auto", overrides), 5)
    train(config, tmp_path / "auto", overrides)
    assert logged_steps(tmp_path / "auto") == list(range(1, 7))
    finished_run(tmp_path / "whole", SIX_STEPS)
    assert logged(tmp_path / "auto") == logged(tmp_path / "whole")


def test_resume_auto_forgets_what_no_checkpoint_holds(config: Path, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"resume": "auto", "do_eval": True}
    stop_after(trainer(config, tmp_path, overrides), 2)
    train(config, tmp_path, overrides)
    assert logged_steps(tmp_path) == [1, 2, 3, 4]
    assert len(logged(tmp_path, kind="eval")) == 2  # before the first step, and after the last


def test_an_evaluation_that_a_signal_has_stopped_is_made_on_resuming(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the run, and after its last step, where all but that is done."""
    overrides: dict[str, Any] = {"do_eval": True, "eval_freq": 2, "ckpt_freq": 2, "resume": "auto"}
    for step in (2, 4):
        run = trainer(config, tmp_path, overrides)

        def evaluate(*args: Any, run: Any = run, step: int = step, **kwargs: Any) -> Any:
            if run.step == step:
                run.interrupt.signal_number = signal.SIGTERM
            return finetune.evaluation.evaluate(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(finetune.trainer, "evaluate", evaluate)
            assert run.train() == 128 + signal.SIGTERM
        assert run.metrics.exit_status == 128 + signal.SIGTERM  # what wandb is told
        assert run.step == step and eval_loss_of(checkpoint(tmp_path, step)) is None
    for _ in range(2):  # the second time there is nothing left to do
        train(config, tmp_path, overrides)
        records = read_metrics(metrics_path(tmp_path, "eval"))
        losses = {record["step"]: record["loss"] for record in records}
        assert len(records) == 3 and [*losses] == [0, 2, 4]
        for step in (2, 4):
            assert eval_loss_of(checkpoint(tmp_path, step)) == losses[step]
            assert manifest.first_problem(checkpoint(tmp_path, step)) is None


def test_a_checkpoint_is_whole_at_every_moment_while_its_loss_is_noted(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(tmp_path, SIX_STEPS)
    writer = trainer(config, tmp_path, {**SIX_STEPS, "resume": True}).writer
    replace, seen = os.replace, []

    def look(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(manifest.first_problem(checkpoint(tmp_path, 6)))

    monkeypatch.setattr("finetune.checkpoint.writer.os.replace", look)
    writer.add_eval_loss(6, 2.5)
    assert seen == [None, None, None] and eval_loss_of(checkpoint(tmp_path, 6)) == 2.5
    file = checkpoint(tmp_path, 6) / "info.json"
    file.write_text(file.read_text().replace("2.5", "3.5"))
    assert "info.json" in str(manifest.first_problem(checkpoint(tmp_path, 6)))


def test_resuming_where_there_is_no_checkpoint_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint in"):
        trainer(config, tmp_path / "none", {"resume": True})


def test_an_unfinished_checkpoint_is_ignored_and_removed(config: Path, tmp_path: Path) -> None:
    stop_after(trainer(config, tmp_path, SIX_STEPS), 5)
    unfinished = tmp_path / "checkpoints/checkpoint_000005.incomplete"
    RunRecord(tmp_path).add(trees=["checkpoints/checkpoint_000005.incomplete"])
    shutil.copytree(checkpoint(tmp_path, 3), unfinished)
    run = trainer(config, tmp_path, {**SIX_STEPS, "resume": True})
    assert run.step == 3
    assert not unfinished.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"what is this?" * 100),
        lambda path: path.write_bytes(bytes(1000)),
        lambda path: path.unlink(),
    ],
    ids=["torn", "empty", "text", "zeros", "missing"],
)
def test_a_damaged_checkpoint_is_named_with_the_remedy(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path, damage: Callable[..., Any]
) -> None:
    finished_run(tmp_path, {"ckpt_freq": 2})
    damage(checkpoint(tmp_path, 4) / "resume.pt")
    with pytest.raises(UserError, match=r"checkpoint_000004/resume.pt.*damaged.*Delete"):
        trainer(config, tmp_path, {"resume": True})
    shutil.rmtree(checkpoint(tmp_path, 4))  # the remedy
    assert trainer(config, tmp_path, {"resume": True}).step == 2


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets the size in bytes above which writing fails, which is what a full disk comes to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_start_on_a_full_disk_is_one_message_and_leaves_nothing(
    tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    run_dir = tmp_path / "runs/one"
    args = TrainArgs(data=DataArgs(), run_dir=str(run_dir))
    folder = RunFolder(args, World(rank=0, size=1, device=torch.device("cpu")))
    largest_file(0)
    with pytest.raises(UserError, match=r"run_dir: cannot write to .*/one"), folder.starting():
        folder.open()
    largest_file(resource.RLIM_INFINITY)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("file", "run_name"),
    [
        ("consolidated/consolidated.safetensors", ""),
        ("resume/__0_0.distcp", ""),
        ("args.yaml", "long " * 135_000),  # larger than all that is written before it
    ],
)
def test_a_checkpoint_that_does_not_fit_on_the_disk_harms_nothing(
    config: Path,
    finished_run: Callable[..., Any],
    tmp_path: Path,
    largest_file: Callable[[int], None],
    file: str,
    run_name: str,
) -> None:
    overrides: dict[str, Any] = {**FULL, "param_dtype": "float32", **SIX_STEPS}
    overrides |= {"wandb.run_name": run_name} if run_name else {}
    finished_run(tmp_path / "whole", overrides)
    run = trainer(config, tmp_path / "cut", overrides)
    size = (checkpoint(tmp_path / "whole", 6) / file).stat().st_size
    save = run.save

    def save_into_less(data_position: dict[str, Any] | None = None) -> None:
        if run.step == 6:
            run.writer.wait()  # the one of step 3 has all the room that it needs
            largest_file(size - 500)
        save(data_position)

    run.save = save_into_less  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"checkpoint of step 6 .*Older checkpoints are untouched"):
        run.train()
    largest_file(resource.RLIM_INFINITY)
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["checkpoint_000003"]
    train(config, tmp_path / "cut", {**overrides, "resume": True})
    assert_same_weights(saved_weights(tmp_path / "cut", 6), saved_weights(tmp_path / "whole", 6))


def test_where_no_checkpoint_was_saved_the_advice_leads_out(
    config: Path, tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    """No message proposes what another refuses."""
    overrides: dict[str, Any] = {**FULL, "max_steps": 2, "ckpt_freq": 1}
    run = trainer(config, tmp_path / "cut", overrides)
    save = run.save

    def save_into_nothing(data_position: dict[str, Any] | None = None) -> None:
        largest_file(5000)
        save(data_position)

    run.save = save_into_nothing  # type: ignore[method-assign]
    with pytest.raises(UserError) as ended:
        run.train()
    largest_file(resource.RLIM_INFINITY)
    assert "No checkpoint was saved before: make room" in str(ended.value)
    assert "--resume=auto" in str(ended.value) and "--overwrite" not in str(ended.value)
    with pytest.raises(UserError, match=r"no complete checkpoint .* --resume=auto"):
        trainer(config, tmp_path / "cut", {**overrides, "resume": True})
    with pytest.raises(UserError, match="already holds a run") as refused:
        trainer(config, tmp_path / "cut", overrides)
    assert "--resume" not in str(refused.value) and "--overwrite_run_dir" in str(refused.value)
    shutil.copytree(tmp_path / "cut", tmp_path / "auto")
    train(config, tmp_path / "cut", {**overrides, "overwrite_run_dir": True})
    train(config, tmp_path / "auto", {**overrides, "resume": "auto"})
    for name in ("cut", "auto"):
        assert logged_steps(tmp_path / name) == [1, 2] and checkpoint(tmp_path / name, 2).is_dir()
