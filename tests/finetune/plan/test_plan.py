"""`moshi-ttt plan`: what a run takes, against what was measured."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from training_tools import FULL, LORA

from finetune.__main__ import main
from finetune.config import (
    DataArgs,
    LoraArgs,
    ModelPaths,
    OptimArgs,
    ParallelArgs,
    TrainArgs,
    load_config,
)
from finetune.errors import UserError
from finetune.model import plan_model
from finetune.plan import estimate, plan, table
from finetune.plan.advice import ways_to_fit
from finetune.plan.plan import shape_of
from finetune.plan.search import keeping_writes
from ttt import TTTArgs

MOSHI = TrainArgs(
    DataArgs(train_data="nowhere.jsonl"),
    "",
    moshi_paths=ModelPaths(hf_repo_id=None, random_init=True),
    lora=LoraArgs(enable=True, rank=128),
    ttt=TTTArgs(enabled=True, target="text"),
    duration_sec=100,
    batch_size=16,
)
"""Moshi 7B as docs/benchmarks.md has measured it."""


def planned(args: TrainArgs, **kwargs: Any) -> list[Any]:
    return list(plan(args, **{"num_gpus": 1, "gpu_memory_gb": 80, **kwargs}))


def peak_gb(lines: list[Any]) -> float:
    peak = re.search(r"peak +([\d.]+) GB", "\n".join(lines))
    assert peak is not None
    return float(peak[1])


OFF: dict[str, Any] = {"ttt": TTTArgs()}
HIDDEN: dict[str, Any] = {"ttt": TTTArgs(enabled=True)}
SHARDED: dict[str, Any] = {"parallel": ParallelArgs(shard_size=2)}
ALL_WEIGHTS: dict[str, Any] = {"full_finetuning": True, "lora": LoraArgs()}
NF4: dict[str, Any] = {
    "base_precision": "nf4",
    "lora": LoraArgs(enable=True, rank=64),
    "optim": OptimArgs(state="int8"),
    "batch_size": 1,
}
ALONE: dict[str, Any] = {"lora": LoraArgs(enable=False), "batch_size": 8}


@pytest.mark.parametrize(
    ("changes", "measured_gb"),
    [
        (OFF, 34.7),
        ({"ttt": TTTArgs(enabled=True, write="sum", target="text")}, 36.1),
        ({"ttt": TTTArgs(enabled=True, write="delta", target="text")}, 37.6),
        (HIDDEN, 37.6),
        ({"ttt": TTTArgs(enabled=True, method="linear")}, 39.4),
        ({"ttt": TTTArgs(enabled=True, method="mlp")}, 51.83),
        ({"batch_size": 4}, 27.0),
        ({**OFF, "gradient_checkpointing": "selective"}, 109.7),
        ({**OFF, "gradient_checkpointing": "selective", "batch_size": 21}, 136.0),
        ({**OFF, "selective_layers": 5}, 43.5),
        ({**OFF, "selective_layers": 16}, 62.7),
        ({**HIDDEN, "selective_layers": 32}, 97.5),
        ({"batch_size": 8}, 31.91),
        ({**OFF, "batch_size": 4}, 25.92),
        (NF4, 9.2),
        (ALONE, 23.29),
        ({**ALONE, "base_precision": "float8"}, 16.2),
        ({**ALONE, "base_precision": "nf4"}, 13.12),
        (SHARDED, 26.1),
        ({**OFF, **SHARDED}, 25.5),
        ({**SHARDED, **ALL_WEIGHTS}, 68.0),
    ],
    ids=[
        *("off", "sum", "delta", "hidden", "linear", "mlp"),
        *("batch 4", "selective", "selective, 21"),
        *("selective in 5", "in 16", "hidden, in 32"),
        *("batch 8", "off, batch 4", "nf4"),
        *("TTT alone", "TTT alone in float8", "TTT alone in nf4"),
        *("sharded", "sharded, off", "sharded, all weights"),
    ],
)
def test_the_peak_is_near_the_measured_one(changes: dict[str, Any], measured_gb: float) -> None:
    num_gpus = changes["parallel"].shard_size if "parallel" in changes else 1
    args = dataclasses.replace(MOSHI, **changes)
    lines = planned(args, num_gpus=num_gpus, gpu_memory_gb=150)
    # Up to 10 % more; never less, for then a run that was said to fit might not.
    assert measured_gb <= peak_gb(lines) <= 1.1 * measured_gb
    assert lines[-1] == "it fits"
    tokens = 9 * 1250 * args.batch_size * num_gpus
    assert any(f"{tokens // 1000}k tokens" in line for line in lines)


def test_layers_before_the_first_that_trains_keep_nothing() -> None:
    alone = dataclasses.replace(MOSHI, lora=LoraArgs(enable=False), gradient_checkpointing=False)
    late = dataclasses.replace(alone, ttt=dataclasses.replace(alone.ttt, start_layer=29))
    # Of 32 layers a gradient passes 27 and 3.
    assert peak_gb(planned(late)) < peak_gb(planned(alone)) - 20
    everywhere = dataclasses.replace(late, lora=LoraArgs(enable=True, rank=128))
    assert peak_gb(planned(everywhere)) > peak_gb(planned(alone))


@pytest.mark.parametrize(
    ("gpu_memory_gb", "proposed"),
    [(42, None), (48, "selective_layers: 4"), (141, "gradient_checkpointing: selective")],
)
def test_what_is_faster_in_the_memory_that_is_left_is_proposed(
    gpu_memory_gb: float, proposed: str | None
) -> None:
    run = dataclasses.replace(MOSHI, **HIDDEN)
    lines = planned(run, gpu_memory_gb=gpu_memory_gb)
    found = [line for line in lines if line.startswith("faster")]
    assert lines[-1] == "it fits" and len(found) == (proposed is not None)
    if proposed is None:
        return
    match = re.search(r"left: (\w+): (\w+) \(([\d.]+) GB, about ([\d.]+) s a step\)", found[0])
    assert match is not None and f"{match[1]}: {match[2]}" == proposed
    value: Any = int(match[2]) if match[2].isdigit() else match[2]
    faster = planned(dataclasses.replace(run, **{match[1]: value}), gpu_memory_gb=gpu_memory_gb)
    assert faster[-1] == "it fits" and not any(line.startswith("faster") for line in faster)
    assert peak_gb(faster) == float(match[3]) > peak_gb(lines)
    assert any(f"about {match[4]} s a step" in line for line in faster)


def test_no_layers_are_proposed_that_spare_nothing() -> None:
    mlp = dataclasses.replace(MOSHI, ttt=TTTArgs(enabled=True, method="mlp"))
    # Room for 31, but the last five are those with TTT, whose scan is made again all the same.
    (line,) = (each for each in planned(mlp, gpu_memory_gb=110) if each.startswith("faster"))
    assert "selective_layers: 27 " in line
    last = dataclasses.replace(MOSHI, **HIDDEN, lora=LoraArgs(enable=False))
    alone = dataclasses.replace(last, ttt=dataclasses.replace(last.ttt, start_layer=29))
    # A gradient passes three layers alone: the others keep nothing, and are not made again.
    (line,) = (each for each in planned(alone, gpu_memory_gb=30) if each.startswith("faster"))
    assert "selective_layers: 2 " in line


def test_a_table_proposes_nothing_for_what_is_kept_for_speed() -> None:
    kept = dataclasses.replace(MOSHI, selective_layers=16)
    assert list(table(kept)) == list(table(MOSHI))


def test_fewer_layers_keep_their_products_where_all_do_not_fit() -> None:
    run = dataclasses.replace(MOSHI, **HIDDEN, selective_layers=16)
    assert "selective_layers: 4" in advised(run, 48)
    assert "selective_layers: 0" in advised(run, 42)
    assert "selective_layers: 0, ttt.keep_writes: false" in advised(run, 39.5)
    selective = dataclasses.replace(
        MOSHI, **HIDDEN, gradient_checkpointing="selective", selective_layers=0
    )
    assert advised(selective, 48)[0] == "gradient_checkpointing: true, selective_layers: 4"
    assert advised(selective, 42)[0] == "gradient_checkpointing: true"
    least = "ttt.keep_writes: false"
    assert advised(selective, 39.5)[0] == f"gradient_checkpointing: true, {least}"
    # Together with fewer bits none of them does.
    first = advised(run, 24)[0]
    assert first.startswith(f"selective_layers: 0, {least}, base_precision: nf4, ")


def test_what_is_not_to_be_kept_twice_is_refused(config: Path) -> None:
    for mode in ("selective", False):
        changes = [f"gradient_checkpointing={str(mode).lower()}", "selective_layers=4"]
        with pytest.raises(UserError, match=f"layers, gradient_c.*: with {str(mode).lower()} no"):
            load_config(config, dict(change.split("=") for change in changes))
    with pytest.raises(UserError, match="selective_layers: must lie between 0 and the model's 32"):
        planned(dataclasses.replace(MOSHI, selective_layers=33))


def test_what_does_not_fit_is_said_with_what_would() -> None:
    full = dataclasses.replace(MOSHI, full_finetuning=True, lora=LoraArgs(), batch_size=8)
    lines = planned(full)
    start = next(i for i, line in enumerate(lines) if line.startswith("it does not fit"))
    advice = "\n".join(lines[start:])
    assert "GPUs: 2 with parallel.shard_size: 2" in advice
    # LoRA beside full fine-tuning would be refused.
    assert "full_finetuning: false with lora.enable: true" in advice
    # Two GPUs make a step of twice as many segments, unless they are told not to.
    assert "shard_size: 2 (16 segments a step, not 8; batch_size: 4 keeps 8)" in advice
    assert advice.count("batch_size") == 1
    peaks = [peak_gb(planned(full, num_gpus=n)) for n in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    # Weights, gradients and two moments of 7.8 billion parameters, in float32 and bfloat16.
    assert peaks[0] * 1e9 > 7.77e9 * 18
    assert planned(full, num_gpus=8)[-1] == "it fits"


def test_a_smaller_batch_keeps_the_step_by_more_micro_batches() -> None:
    lines = planned(dataclasses.replace(MOSHI, batch_size=128))
    assert any("batch_size: 64 with num_microbatches: 2" in line for line in lines)
    with pytest.raises(UserError, match=r"parallel.shard_size"):
        args = dataclasses.replace(
            MOSHI, parallel=dataclasses.replace(MOSHI.parallel, shard_size=3)
        )
        planned(args, num_gpus=8)


def advised(args: TrainArgs, gpu_memory_gb: float, *, whole: bool = False) -> list[str]:
    """What is said to change, without the memory that it takes then; or whole lines."""
    lines = planned(args, gpu_memory_gb=gpu_memory_gb)
    start = next(i for i, line in enumerate(lines) if line.startswith("it does not fit"))
    found = [line.strip() for line in lines[start + 1 :]]
    return found if whole else [line.rpartition(":")[0] for line in found]


def test_where_no_single_change_is_enough_on_one_gpu_some_are_together() -> None:
    narrow = "ttt.keep_writes: false, base_precision: nf4, optim.state: int8"
    assert advised(MOSHI, 24) == [
        f"{narrow}, batch_size: 8 with num_microbatches: 2",
        f"{narrow}, batch_size: 12 (12 segments a step, not 16)",
        "GPUs: 4 with parallel.shard_size: 4, ttt.keep_writes: false "
        "(64 segments a step, not 16; batch_size: 4 keeps 16)",
    ]
    shared = dataclasses.replace(MOSHI, parallel=ParallelArgs(shard_size=4))
    for run, last in ((shared, "GPUs: 8"), (keeping_writes(shared, keep=False), "it fits")):
        assert last in planned(run, num_gpus=4, gpu_memory_gb=24)[-1]
    # These are no changes from one setting only: they do fit.
    optim = OptimArgs(state="int8")
    ttt = dataclasses.replace(MOSHI.ttt, keep_writes=False)
    together = dataclasses.replace(MOSHI, base_precision="nf4", optim=optim, ttt=ttt)
    for batch_size, num_microbatches in ((8, 2), (12, 1)):
        changed = dataclasses.replace(
            together, batch_size=batch_size, num_microbatches=num_microbatches
        )
        assert planned(changed, gpu_memory_gb=24)[-1] == "it fits"
    more = planned(dataclasses.replace(together, batch_size=13), gpu_memory_gb=24)
    assert more[-1] != "it fits"
    assert "parallel.shard_size: 2, optim.state: bfloat16" in more[-1]
    # Of what a run has already nothing is said, and what computes the same comes first.
    plain = dataclasses.replace(together, base_precision="bfloat16", gradient_checkpointing=False)
    first = advised(plain, 24)[0]
    assert first.startswith("gradient_checkpointing: true, base_precision: nf4, batch_size: 8 ")
    full = dataclasses.replace(MOSHI, full_finetuning=True, lora=LoraArgs())
    wanted = f"full_finetuning: false, lora.enable: true, {narrow.split(', ')[0]}, base_prec"
    assert advised(full, 24)[0].startswith(wanted)


def test_a_smaller_step_is_said_of_all_gpus() -> None:
    """Each has a batch of its own."""
    narrow = dataclasses.replace(MOSHI, base_precision="nf4")
    lines = planned(narrow, num_gpus=2, gpu_memory_gb=24)
    assert any(line.startswith("a step: 32 segments") for line in lines)
    assert any("batch_size: 7 (14 segments a step, not 32)" in line for line in lines)


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "said"),
    [
        (16, 1, "64 segments a step, not 16; batch_size: 4 keeps 16"),
        (2, 6, "48 segments a step, not 12; batch_size: 1, num_microbatches: 3 keeps 12"),
        (2, 8, "64 segments a step, not 16; num_microbatches: 2 keeps 16"),
        (3, 1, "12 segments a step, not 3; nothing keeps 3"),
    ],
)
def test_more_gpus_say_how_a_step_stays_as_large(
    batch_size: int, num_microbatches: int, said: str
) -> None:
    model = plan_model(MOSHI, shape_of(MOSHI.moshi_paths)[0])
    args = dataclasses.replace(MOSHI, batch_size=batch_size, num_microbatches=num_microbatches)
    four = dataclasses.replace(args, parallel=ParallelArgs(shard_size=4))
    most = estimate(four, model, 4).peak
    ways = ways_to_fit(args, model, shape_of(args.moshi_paths)[0], 1, lambda m: m.peak <= most)
    assert any(way.startswith(f"GPUs: 4 with parallel.shard_size: 4 ({said})") for way in ways)


def test_where_nothing_is_enough_the_smallest_gpu_is_named() -> None:
    tiny = planned(MOSHI, gpu_memory_gb=4)[-1]
    match = re.search(r"takes ([\d.]+) GB, with (.*); the smallest GPU .* has (\d+) GB", tiny)
    assert match is not None and "no change is enough, nor all together" in tiny
    wanted = (
        "ttt.keep_writes: false, base_precision: nf4, optim.state: int8, "
        "batch_size: 1 with num_microbatches: 16"
    )
    assert match[2] == f"{wanted}, duration_sec: 62, lora.rank: 1"
    changed = dataclasses.replace(
        MOSHI,
        base_precision="nf4",
        optim=OptimArgs(state="int8"),
        batch_size=1,
        num_microbatches=16,
        duration_sec=62,
        ttt=dataclasses.replace(MOSHI.ttt, keep_writes=False),
        lora=LoraArgs(enable=True, rank=1),
    )
    enough_gb = int(match[3])
    lines = planned(changed, gpu_memory_gb=enough_gb)
    assert lines[-1] == "it fits" and peak_gb(lines) == float(match[1])
    # With all of it in force nothing is left to propose.
    (said,) = advised(changed, 4, whole=True)
    assert f"it takes {match[1]} GB, as it is; the smallest GPU" in said
    # There, of sequences and adapters one alone need be smaller.
    assert advised(MOSHI, enough_gb)[0] == f"{wanted}, lora.rank: 8"


def test_changes_that_are_in_force_are_not_proposed_again() -> None:
    """LoRA in few bits, a sequence at a time: what is left are shorter ones, smaller adapters."""
    narrow = dataclasses.replace(MOSHI, **NF4, **OFF)
    (said,) = advised(narrow, 2, whole=True)
    named = re.findall(r"[\w.]+(?=: )", said.partition(", with ")[2])
    assert named == ["duration_sec", "lora.rank"]


def test_the_largest_batch_that_fits_is_proposed() -> None:
    narrow = dataclasses.replace(MOSHI, base_precision="nf4")
    ways = advised(narrow, 24)
    assert ways[:2] == [
        "batch_size: 4 with num_microbatches: 4",
        "batch_size: 7 (7 segments a step, not 16)",
    ]
    fitting = [
        planned(dataclasses.replace(narrow, batch_size=n), gpu_memory_gb=24)[-1] == "it fits"
        for n in (7, 8)
    ]
    assert fitting == [True, False]


def test_no_duration_is_proposed_in_which_ttt_has_hardly_anything_to_do() -> None:
    long = dataclasses.replace(MOSHI, duration_sec=400, batch_size=4)
    assert long.ttt.update_frames == 256
    (duration,) = (way for way in advised(long, 31) if way.startswith("duration_sec"))
    # At least three updates, and no second more would fit.
    sec = int(duration.split()[1])
    assert 61.5 < sec < 400
    longer = dataclasses.replace(long, duration_sec=sec + 1)
    assert planned(longer, gpu_memory_gb=31)[-1] != "it fits"
    assert planned(dataclasses.replace(long, duration_sec=sec), gpu_memory_gb=31)[-1] == "it fits"
    short = dataclasses.replace(long, duration_sec=100, batch_size=16)
    assert not any("duration_sec" in way for way in advised(short, 30))
    off = dataclasses.replace(short, ttt=TTTArgs())
    assert any("duration_sec" in way for way in advised(off, 30))


@pytest.mark.parametrize("kind", [FULL, LORA])
def test_the_command_plans_a_run_of_a_small_model(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
) -> None:
    options = [f"--{key}={value}" for key, value in kind.items()]
    arguments = ["moshi-ttt", "plan", f"--config={config}", "--gpus=2", "--gpu_memory=8"]
    monkeypatch.setattr("sys.argv", [*arguments, *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    output = capsys.readouterr().out
    assert "data: 7 segments, 1.8 steps an epoch; the run is 2.29 epochs" in output
    assert "2 GPUs: " + ("one copy" if kind is FULL else "each holds everything") in output
    assert output.strip().endswith("it fits")


def test_parts_of_a_model_take_less(config: Path) -> None:
    from finetune.model import find_checkpoint

    args = load_config(config, FULL)
    model = plan_model(args, find_checkpoint(args.moshi_paths))
    one, two = (estimate(args, model, n) for n in (1, 2))
    assert two.optimizer == one.optimizer / 2
    assert two.gathered > 0 == one.gathered
    assert two.kept == one.kept


def test_what_chunks_write_is_kept_where_there_is_room() -> None:
    """It spares more time for its memory than whole layers do; where it is not read, nothing is
    said of it."""
    ttt = dataclasses.replace(TTTArgs(enabled=True), keep_writes=False)
    run = dataclasses.replace(MOSHI, ttt=ttt)
    (line,) = (each for each in planned(run, gpu_memory_gb=42) if each.startswith("faster"))
    assert "left: ttt.keep_writes: true (37.8 GB" in line
    mlp = {"ttt": TTTArgs(enabled=True, method="mlp")}
    for changes, room in ((HIDDEN, 40), (mlp, 45)):
        assert advised(dataclasses.replace(MOSHI, **changes), room)[0] == "ttt.keep_writes: false"
    # Where it is enough to keep less, no more GPUs are named for that.
    ways = advised(dataclasses.replace(MOSHI, gradient_checkpointing=False), 80)
    assert ways[0].startswith("gradient_checkpointing: true") and "GPUs" not in " ".join(ways)
    for changes in (OFF, {"ttt": TTTArgs(enabled=True, write="sum", target="text")}):
        assert not any(
            "keep_writes" in each for each in advised(dataclasses.replace(MOSHI, **changes), 30)
        )
