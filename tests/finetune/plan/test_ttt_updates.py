"""In how many segments TTT learns, as a run, its plan and others ask for it."""

from pathlib import Path
from typing import Any

import pytest

from finetune.config import DataArgs, TrainArgs, load_config
from finetune.plan import caution_of_updates, num_learning, plan
from ttt import TTTArgs


def args_of(duration_sec: float = 20.0, **ttt: Any) -> TrainArgs:
    return TrainArgs(
        DataArgs(), "", ttt=TTTArgs(**{"enabled": True, **ttt}), duration_sec=duration_sec
    )


def test_a_segment_as_long_as_a_chunk_learns_nothing() -> None:
    assert num_learning(TTTArgs(chunk_size=25), [24, 25, 26, 250]) == 2
    assert num_learning(TTTArgs(method="mlp", mini_batch_size=16), [16, 17]) == 1


@pytest.mark.parametrize(
    ("segment_frames", "caution"),
    [
        (None, None),
        # What is left over at the ends of recordings is often short.
        ([250, 50, 250, 50], None),
        (
            [250, 50, 50],
            "TTT never learns anything in 2 of 3 segments, 67% of what is drawn, as they are",
        ),
        ([200, 200], "no segment is longer than ttt.chunk_size (200 frames), the longest has 200"),
    ],
)
def test_few_segments_in_which_ttt_learns_are_warned_of(
    segment_frames: list[int] | None, caution: str | None
) -> None:
    found = caution_of_updates(args_of(chunk_size=200), segment_frames)
    assert caution_of_updates(args_of(chunk_size=200, enabled=False), segment_frames) is None
    assert found is None if caution is None else found and found.startswith(caution)


def test_segments_count_as_often_as_they_are_drawn() -> None:
    args, frames = args_of(chunk_size=200), [250, *[50] * 9]
    assert caution_of_updates(args, frames, [0.9, *[0.1 / 9] * 9]) is None
    found = caution_of_updates(args, frames[::-1], [*[0.1] * 9, 0.1])
    assert found and "in 9 of 10 segments, 90% of what is drawn" in found
    rare = caution_of_updates(args, [*[250] * 9, 50], [*[0.01] * 9, 0.91])
    assert rare and "in 1 of 10 segments, 91% of what is drawn" in rare


@pytest.mark.parametrize(
    ("duration_sec", "segment_frames", "remedy"),
    [
        # Longer segments can be cut of these, and of the others not.
        (20, [250, 50, 50], "Lower ttt.chunk_size, or raise duration_sec, or train on longer rec"),
        (20, [240, 50, 50], "Lower ttt.chunk_size, or train on longer recordings."),
        (10, [120, 50, 50], "Lower ttt.chunk_size, or train on longer recordings, with a longer"),
        (10, [125, 50, 50], "Raise the one or lower the other."),
        (10, None, "Raise the one or lower the other."),
    ],
)
def test_the_remedy_is_one(
    duration_sec: float, segment_frames: list[int] | None, remedy: str
) -> None:
    found = caution_of_updates(args_of(duration_sec, chunk_size=200), segment_frames)
    assert found and remedy in found


def test_mixers_read_what_the_open_mini_batch_learns() -> None:
    args = args_of(method="linear", mini_batch_size=100)
    found = caution_of_updates(args, [60, 90])
    assert found and "(7.2 s): TTT carries nothing on. Lower ttt.mini_batch_size, or" in found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "up to 4 updates a sequence, every 5 frames (0.4 s), in 6 of 7 segments"),
        (
            {"ttt.chunk_size": 5000},
            "warning: duration_sec is 2 (25 frames), not longer than ttt.ch",
        ),
        (
            {"duration_sec": 4, "ttt.chunk_size": 40},
            "warning: no segment is longer than ttt.chunk_",
        ),
        ({"ttt.enabled": False}, "TTT: off; attention sees 12 frames of 25"),
        # Where the recordings are not known, their lengths are not either.
        (
            {"data.train_data": "nowhere.jsonl", "ttt.chunk_size": 50},
            "warning: duration_sec is 2 (25 frames), not longer than ttt.chunk_size (50 frames)",
        ),
    ],
)
def test_a_plan_says_what_a_run_says(
    config: Path, overrides: dict[str, Any], expected: str
) -> None:
    args = load_config(config, {"full_finetuning": True, **overrides})
    lines = list(plan(args, num_gpus=1, gpu_memory_gb=80))
    assert expected in "\n".join(lines)
    has_warning = any(line.startswith("warning: ") for line in lines)
    assert has_warning == expected.startswith("warning: ")
