"""The time of a step that `plan` says, against what was measured (docs/benchmarks.md)."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_plan import ALL_WEIGHTS, HIDDEN, MOSHI, NF4, OFF, SHARDED, planned

from finetune.config import TrainArgs, load_config
from finetune.model import plan_model
from finetune.plan.plan import shape_of
from finetune.plan.speed import FEW_FRAMES, SMALLEST_SEC, StepTime, step_time
from ttt import TTTArgs


def time_of(args: TrainArgs, num_gpus: int = 1) -> StepTime:
    return step_time(args, plan_model(args, shape_of(args.moshi_paths)[0]), num_gpus)


FLOAT8: dict[str, Any] = {"base_precision": "float8"}


@pytest.mark.parametrize("measured_sec", [1.578, 1.625])
def test_the_time_without_ttt_is_near_the_measured_one(measured_sec: float) -> None:
    """In runs on several hosts, with code of two days."""
    assert time_of(dataclasses.replace(MOSHI, **OFF)).low_sec == pytest.approx(
        measured_sec, rel=0.03
    )


DELTA = {"ttt": TTTArgs(enabled=True, write="delta", target="text")}
MLP = {"ttt": TTTArgs(enabled=True, method="mlp")}
ONE_GPU: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("changes", "measured_sec", "beside", "beside_sec"),
    [
        ({"ttt": TTTArgs(enabled=True, write="sum", target="text")}, 1.625, OFF, 1.578),
        (HIDDEN, 1.639, OFF, 1.578),
        ({"ttt": TTTArgs(enabled=True, method="linear")}, 1.766, OFF, 1.615),
        (MLP, 2.036, OFF, 1.615),
        ({**OFF, "gradient_checkpointing": "selective"}, 1.270, OFF, 1.647),
        ({**OFF, "selective_layers": 5}, 1.584, OFF, 1.635),
        ({**OFF, "selective_layers": 16}, 1.470, OFF, 1.635),
        ({**HIDDEN, "selective_layers": 32}, 1.370, OFF, 1.635),
        ({**OFF, **FLOAT8}, 1.141, OFF, 1.578),
        ({**DELTA, **FLOAT8}, 1.224, OFF, 1.578),
        (
            {**OFF, **FLOAT8, "gradient_checkpointing": "selective"},
            0.954,
            {**OFF, **FLOAT8},
            1.241,
        ),
        (SHARDED, 1.816, ONE_GPU, 1.708),
        ({**SHARDED, **ALL_WEIGHTS}, 2.121, SHARDED, 1.816),
    ],
    ids=[
        *("sum", "hidden", "linear", "mlp", "selective"),
        *("selective in 5", "in 16", "hidden, in 32"),
        *("float8, off", "float8, delta", "float8, selective"),
        *("sharded", "sharded, all weights"),
    ],
)
def test_times_are_as_far_apart_as_measured_ones(
    changes: dict[str, Any], measured_sec: float, beside: dict[str, Any], beside_sec: float
) -> None:
    """Each beside another of the same run: hosts differ by 2 to 3 %."""
    times: list[float] = []
    for own in (changes, beside):
        step = time_of(
            dataclasses.replace(MOSHI, **own),
            own["parallel"].shard_size if "parallel" in own else 1,
        )
        assert step.is_known and step.low_sec == step.high_sec
        times.append(step.low_sec)
    assert times[0] / times[1] == pytest.approx(measured_sec / beside_sec, rel=0.02)


def test_of_a_small_model_no_time_is_said(config: Path) -> None:
    """What its kernels take to start was not measured, and is most of it."""
    (line,) = (
        line for line in planned(load_config(config, {"device": "auto"})) if line.startswith("time")
    )
    assert "model of fewer than 0.77 billion parameters was not measured" in line
    assert "its arithmetic alone takes" in line and "between" not in line


def test_of_nf4_no_time_is_said_that_is_below_what_was_measured() -> None:
    step = time_of(dataclasses.replace(MOSHI, **NF4))
    assert not step.is_known
    assert step.low_sec == pytest.approx(SMALLEST_SEC, rel=0.01)
    assert step.low_sec <= step.high_sec == pytest.approx(SMALLEST_SEC, rel=0.03)
    # Its products are those of bfloat16: a larger step is no faster than there.
    large = time_of(dataclasses.replace(MOSHI, base_precision="nf4"))
    assert time_of(MOSHI).high_sec == large.low_sec < large.high_sec


def test_of_steps_of_few_frames_the_time_is_not_known() -> None:
    few = dataclasses.replace(MOSHI, batch_size=FEW_FRAMES // 1250 - 1)
    step = time_of(few)
    assert not step.is_known and step.low_sec < step.high_sec
    assert time_of(dataclasses.replace(few, batch_size=FEW_FRAMES // 1250)).is_known
    # What is of each micro-batch counts as often as there are any.
    several = time_of(dataclasses.replace(few, num_microbatches=4))
    assert several.high_sec == pytest.approx(4 * step.high_sec)
    (said,) = (line for line in planned(few) if line.startswith("time on"))
    start = (
        "time on H100s or H200s (no other GPUs were measured): a step of fewer than 10000 frames"
    )
    start += " with base_precision: bfloat16"
    bounds = f"{step.low_sec:.2f} and {step.high_sec:.2f} s a step"
    assert said.startswith(f"{start} was not measured; it should lie between {bounds}, ")
    (said,) = (line for line in planned(dataclasses.replace(MOSHI, **NF4)) if "time on" in line)
    assert "a step with base_precision: nf4 of this size was not measured; it should" in said
    (said,) = (line for line in planned(few) if line.startswith("time on"))
    assert "took 0.43 s for 1250 frames" in said
    (said,) = (line for line in planned(MOSHI) if line.startswith("time on"))
    assert f"about {time_of(MOSHI).low_sec:.2f} s a step" in said


def test_a_larger_step_in_nf4_was_within_the_bounds() -> None:
    step = time_of(dataclasses.replace(MOSHI, **{**NF4, "batch_size": 8}))
    assert step.low_sec <= 0.904 <= step.high_sec
