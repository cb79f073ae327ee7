"""Several processes on the CPU, whole models or parts of one, against a single process."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from helpers import random_codes, tiny_delta_args, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from training_tools import (
    FULL,
    LORA,
    REPOSITORY,
    checkpoint,
    logged,
    logged_steps,
    run_cases,
    saved_weights,
    train,
    trainer,
)

from finetune.config import DataArgs, ParallelArgs, TrainArgs, load_config
from finetune.data import build_train_loader
from finetune.distributed import Sharding, World, shard_size
from finetune.distributed.sharding import whole
from finetune.distributed.world import build_mesh
from finetune.errors import UserError
from finetune.model import find_checkpoint, load_model
from finetune.monitoring import metrics_path, read_metrics
from finetune.step import LossWeights, accumulate_gradients
from ttt import TTTLMModel
from ttt.layers import execution

# Adam makes a whole step of a gradient that is nothing but rounding: at this learning rate such
# steps are below what is compared.
COMMON: dict[str, Any] = {
    "param_dtype": "float32",
    "optim.lr": 1e-4,
    "optim.ttt_lr": 1e-4,
    "max_steps": 3,
    "do_eval": True,
    "text_padding_weight": 0.3,
}
LINEAR: dict[str, Any] = {"ttt.method": "linear", "ttt.mini_batch_size": 5}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
CASES: dict[str, Any] = {
    "lora, in-place": {**LORA, "lora.ft_embed": True, "num_microbatches": 2},
    "lora, delta": {**LORA, "ttt.write": "delta", "save_adapters": False, **CHECKPOINTED},
    "lora, nf4": {**LORA, "base_precision": "nf4"},
    "full, linear": {**FULL, **LINEAR, "gradient_checkpointing": "selective"},
    "full, random": {
        **FULL,
        "moshi_paths.random_init": True,
        "num_microbatches": 2,
        "optim.state": "bfloat16",
    },
}
MORE_CASES: dict[str, Any] = {
    "lora, replicas": {**LORA, "parallel.shard_size": 1},
    "lora, nf4, micro-batches": {**LORA, "base_precision": "nf4", "num_microbatches": 2},
    "full, in-place": {**FULL, **CHECKPOINTED, "num_microbatches": 2},
    "full, mlp": {**FULL, **LINEAR, "ttt.method": "mlp"},
}
"""Whose parts are parts of the others: replicas are there in pairs, too, and `mlp` has all that is
sharded from `linear`."""
COMPILED = ("lora, delta", "full, linear")
"""Of these cases, those that are also compiled."""
PAIRS: dict[str, Any] = {"pairs, replicas": 1, "pairs, sharded": 2}
RESUMED: dict[str, Any] = {**FULL, **COMMON, "ckpt_freq": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


def run_on_two(folder: Path, config: Path, runs: dict[Path, Any]) -> str:
    runs = {run: {"parallel.shard_size": 2, **o, "batch_size": 2} for run, o in runs.items()}
    return run_cases(folder, config, 2, runs)


@pytest.fixture(scope="module")
def two(folder: Path, config: Path) -> str:
    """Runs on two processes, each of which has half of the model, if nothing else is said."""
    runs = {folder / name: {**COMMON, **overrides} for name, overrides in CASES.items()}
    runs[folder / "two"] = RESUMED
    output = run_on_two(folder, config, runs)
    # Two processes saved step 1, and no later one.
    shutil.copytree(checkpoint(folder / "two", 1), checkpoint(folder / "four", 1))
    shutil.copy(folder / "two/args.yaml", folder / "four/args.yaml")
    return output


@pytest.fixture(scope="module")
def four(folder: Path, config: Path, two: str) -> str:
    """Four processes go on from what two have saved: in two copies of the model, two parts each.
    Then they stand in pairs that read the same data, and share a model with another pair or not."""
    overrides: dict[str, Any] = {
        **RESUMED,
        "batch_size": 1,
        "parallel.shard_size": 2,
        "resume": True,
    }
    pairs = {
        folder / name: {**RESUMED, "batch_size": 2, "parallel.shard_size": size}
        for name, size in PAIRS.items()
    }
    cases: dict[Path, dict[str, Any]] = {folder / "four": overrides, **pairs}
    return run_cases(folder, config, 4, cases, with_toy_dimension=pairs)


@pytest.fixture(scope="module")
def one(folder: Path, config: Path) -> Path:
    """The run that one process makes."""
    train(config, folder / "one", {**RESUMED, "batch_size": 4})
    return folder / "one"


def assert_same_runs(one: Path, other: Path, last_step: int) -> None:
    for kind in ("train", "eval"):
        assert logged(one, kind=kind) == pytest.approx(logged(other, kind=kind), abs=1e-5)
    norms = logged(one, "grad_norm")
    assert norms == pytest.approx(logged(other, "grad_norm"), rel=1e-4)
    weights = saved_weights(other, last_step)
    for name, weight in saved_weights(one, last_step).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(
    config: Path, tmp_path: Path, folder: Path, two: str, name: str
) -> None:
    train(config, tmp_path, {**COMMON, **CASES[name], "batch_size": 4})
    assert_same_runs(folder / name, tmp_path, 3)


def test_two_processes_are_one_in_full(folder: Path, one: Path, two: str) -> None:
    assert_same_runs(folder / "two", one, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CASES)
def test_two_processes_are_one_in_more_cases(config: Path, tmp_path: Path, name: str) -> None:
    overrides = {**COMMON, **MORE_CASES[name]}
    run_on_two(tmp_path, config, {tmp_path / "two": overrides})
    train(config, tmp_path / "one", {**overrides, "batch_size": 4})
    assert_same_runs(tmp_path / "two", tmp_path / "one", 3)


@pytest.mark.slow
def test_two_processes_that_compile_are_one(config: Path, tmp_path: Path) -> None:
    """Compilation takes most of a minute; what sharded layers compile to is tested below."""
    cases = {name: {**COMMON, **CASES[name]} for name in COMPILED}
    run_on_two(
        tmp_path, config, {tmp_path / name: {**o, "compile": True} for name, o in cases.items()}
    )
    for name, overrides in cases.items():
        train(config, tmp_path / f"{name}, one", {**overrides, "batch_size": 4})
        assert_same_runs(tmp_path / name, tmp_path / f"{name}, one", 3)


def test_what_a_sharded_model_says_is_not_checked_and_the_log_says_so(
    folder: Path, two: str
) -> None:
    num_sharded = 1 + sum(case.get("parallel.shard_size") != 1 for case in CASES.values())
    assert two.count("a sharded model (parallel.shard_size) would have to be") == num_sharded
    assert two.count("health_sec: the health of speech is not checked") == len(CASES) + 1
    assert not any(
        "health" in name for name in read_metrics(metrics_path(folder / "two", "eval"))[0]
    )


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    yield World(0, 1, torch.device("cpu"), mesh=mesh)
    dist.destroy_process_group()


def test_sharded_layers_share_what_is_compiled(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that are not sharded do, however many there are; but for the first, whose input may
    need no gradient. They compute what the plain model does."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    weights = LossWeights(text_padding=0.3, first_codebook=1.0)
    graphs = torch._dynamo.utils.counters["stats"]
    codes = [random_codes(num_frames=12, seed=seed) for seed in range(2)]

    def found(num_layers: int, *, compile: bool, shard: bool) -> tuple[list[Any], Any, int]:
        torch._dynamo.reset()
        execution._compiled.cache_clear()
        before = graphs["unique_graphs"]
        args = tiny_delta_args(start_layer=1, layer_frequency=2)
        model = tiny_model(args, dtype=torch.float32, num_layers=num_layers).train()
        model.execution.__dict__.update({"compile": compile, "checkpointing": True})
        if shard:
            sharding = Sharding.build(alone, torch.float32)
            for _, part in sharding.parts(model):
                sharding.cut(part)
        losses = [accumulate_gradients(model, [each], weights, alone) for each in codes]
        gradients = {
            name: whole(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        return losses, gradients, graphs["unique_graphs"] - before

    *_, num_graphs = found(3, compile=True, shard=False)
    losses, gradients, num_sharded_graphs = found(5, compile=True, shard=True)
    assert num_sharded_graphs == num_graphs > 0
    expected_losses, expected, _ = found(5, compile=False, shard=False)
    assert losses == [pytest.approx(each, rel=1e-6) for each in expected_losses]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_what_two_processes_saved_four_continue(folder: Path, one: Path, four: str) -> None:
    assert logged_steps(folder / "four") == [2, 3]
    assert logged(folder / "four") == pytest.approx(logged(one)[1:], abs=1e-5)
    weights = saved_weights(one, 3)
    for name, weight in saved_weights(folder / "four", 3).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=name)


def test_what_four_processes_saved_one_continues(
    config: Path, tmp_path: Path, folder: Path, one: Path, four: str
) -> None:
    shutil.copytree(checkpoint(folder / "four", 2), checkpoint(tmp_path, 2))
    resumed = train(config, tmp_path, {**RESUMED, "batch_size": 4, "resume": True})
    assert resumed.step == 3
    assert logged(tmp_path) == pytest.approx(logged(one)[2:], abs=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_processes_that_read_the_same_data_count_once(
    folder: Path, one: Path, four: str, name: str
) -> None:
    """Losses, gradients and what is logged are those of two shares of the data, not of four."""
    assert_same_runs(folder / name, one, 3)
    assert logged_steps(folder / name) == [1, 2, 3]
    for metric in ("epoch", "skipped_segments"):
        assert logged(folder / name, metric) == logged(one, metric)
    assert four.count("; 4 a step on 4 x cpu") == 1 + len(PAIRS)


def test_a_pair_is_saved_once_and_one_process_continues(
    config: Path, tmp_path: Path, folder: Path, one: Path, four: str
) -> None:
    for name in PAIRS:
        saved = checkpoint(folder / name, 2)
        shutil.copytree(saved, checkpoint(tmp_path / name, 2))
        overrides: dict[str, Any] = {**RESUMED, "batch_size": 4, "resume": True}
        assert train(config, tmp_path / name, overrides).step == 3
        assert logged(tmp_path / name) == pytest.approx(logged(one)[2:], abs=1e-5)


@pytest.mark.parametrize(
    "sizes, shares",
    [
        ({"replicate": 4, "shard": 1}, [0, 1, 2, 3]),
        ({"replicate": 2, "shard": 2}, [0, 1, 2, 3]),
        ({"replicate": 2, "shard": 1, "toy": 2}, [0, 0, 1, 1]),
        ({"toy": 2, "shard": 2}, [0, 1, 0, 1]),
        ({"toy": 4}, [0, 0, 0, 0]),
    ],
)
def test_a_share_of_the_data_is_not_a_rank(
    config: Path, tmp_path: Path, sizes: dict[str, int], shares: list[int]
) -> None:
    """Each of four processes by itself, in place of which no other one answers."""
    run = trainer(config, tmp_path, {"batch_size": 4})
    whole = next(run.train_data).codes
    for rank, share in enumerate(shares):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            world = World(rank, 4, torch.device("cpu"), mesh=build_mesh(torch.device("cpu"), sizes))
            assert (world.data_rank, world.data_size) == (share, len(set(shares)))
            loader = build_train_loader(
                run.args.data,
                run.codec,
                duration_sec=run.args.duration_sec,
                seed=run.args.seed,
                batch_size=4 // world.data_size,
                rank=world.data_rank,
                world_size=world.data_size,
                device="cpu",
                store=None,
            )
            assert torch.equal(next(loader).codes, whole.chunk(world.data_size)[share])
        finally:
            dist.destroy_process_group()


@pytest.mark.slow
def test_what_four_processes_saved_two_continue(
    config: Path, tmp_path: Path, folder: Path, one: Path, four: str
) -> None:
    shutil.copytree(checkpoint(folder / "four", 2), checkpoint(tmp_path / "run", 2))
    overrides: dict[str, Any] = {**RESUMED, "batch_size": 2, "resume": True}
    run_cases(tmp_path, config, 2, {tmp_path / "run": overrides})
    assert logged(tmp_path / "run") == pytest.approx(logged(one)[2:], abs=1e-5)


def test_the_order_of_data_does_not_depend_on_the_number_of_processes(
    config: Path, tmp_path: Path
) -> None:
    """One process for 2 steps of 4 samples, then two, then four: as one that never stopped."""
    run = trainer(config, tmp_path, {"batch_size": 4})
    expected = torch.cat([next(run.train_data).codes for _ in range(6)])
    places: dict[str, Any] = {
        "duration_sec": run.args.duration_sec,
        "seed": run.args.seed,
        "device": "cpu",
    }
    places["store"] = None
    found, position = [], None
    for size in (1, 2, 4):
        loaders = [
            build_train_loader(
                run.args.data, run.codec, batch_size=4 // size, rank=rank, world_size=size, **places
            )
            for rank in range(size)
        ]
        for loader in loaders:
            if position is not None:
                loader.load_state_dict(position)
        found += [next(loader).codes for _ in range(2) for loader in loaders]
        position = loaders[0].state_dict()
    assert torch.equal(torch.cat(found), expected)


def test_no_more_than_a_part_of_the_model_is_whole_at_a_time(config: Path) -> None:
    class Cutter:
        sizes: list[int]

        def parts(self, model: TTTLMModel) -> Iterator[tuple[str, torch.nn.Module]]:
            self.model, self.sizes = model, []
            return Sharding.parts(cast(Sharding, self), model)

        def cut(self, part: torch.nn.Module) -> None:
            self.sizes.append(sum(p.numel() for p in self.model.parameters() if not p.is_meta))
            for module in part.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.new_zeros(0)))

    args, cutter = load_config(config, LORA), Cutter()
    load_model(args, find_checkpoint(args.moshi_paths), "cpu", cutter)
    whole = load_model(args, find_checkpoint(args.moshi_paths), "cpu")
    assert sum(cutter.sizes) == sum(p.numel() for p in whole.parameters())
    assert max(cutter.sizes) < 0.5 * sum(cutter.sizes)


def test_the_script_for_slurm_is_valid_and_gives_the_options_on() -> None:
    script = REPOSITORY / "example/slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    stubs = 'srun() { shift; echo "$@"; }; scontrol() { echo node1; echo node2; }'
    shell = f'{stubs}; . "$0" "$@"'
    variables: dict[str, Any] = {
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    done = subprocess.run(
        ["bash", "-c", shell, script, "my.yaml", "--run_dir=x y"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=7-0 "
        "--rdzv-endpoint=node1:29500 train.py --config my.yaml --resume=auto --run_dir=x y\n"
    )


def test_processes_are_divided_evenly_or_not_at_all() -> None:
    def size(wanted: Any, num_processes: Any, **overrides: Any) -> int:
        args = TrainArgs(DataArgs(), "", parallel=ParallelArgs(shard_size=wanted), **overrides)
        return shard_size(args, num_processes)

    assert size("auto", 8, full_finetuning=True) == 8
    assert size("auto", 8) == 1
    assert size(4, 8) == 4
    with pytest.raises(UserError, match=r"parallel.shard_size: 8 processes .* groups of 3"):
        size(3, 8)
