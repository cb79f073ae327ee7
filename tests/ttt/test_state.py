"""A stream's state: saved in mid-chunk, restored elsewhere, cleared for some rows."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Program
from helpers import (
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_model,
    tiny_relative_args,
)
from moshi.models.lm import LMGen
from safetensors.torch import load_file, save_file

import ttt
from ttt import TTTLMModel

ARGS: dict[str, Any] = {
    "sum": tiny_args(),
    "delta": tiny_delta_args(),
    "relative": tiny_relative_args(),
    "linear": tiny_linear_args(),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.4, use_rope=True),
}
every_rule = pytest.mark.parametrize("write", ARGS)
SAVE_FRAMES, NUM_FRAMES = 13, 24
"""Saved in the middle of the third chunk."""


def build(write: str) -> TTTLMModel:
    return tiny_model(ARGS[write], dtype=torch.float32)


def user_codes() -> torch.Tensor:
    return random_codes(batch=2, num_frames=NUM_FRAMES)[:, 5:]


def run_and_save(folder: str) -> None:
    """What the process does that is killed: it generates, saves and never ends."""
    for write in ARGS:
        generator = LMGen(build(write), use_sampling=False)
        with generator.streaming(2):
            for t in range(SAVE_FRAMES):
                generator.step(user_codes()[:, :, t : t + 1])
            save_file(ttt.get_state(generator, whole=True), Path(folder, f"{write}.safetensors"))
    print("saved", flush=True)
    sys.stdin.read()


@pytest.fixture(scope="module")
def saved_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The states that a killed process has left, a file for each rule."""
    folder = tmp_path_factory.mktemp("states")
    here = Path(__file__).parent
    process = Program(
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
        f"import test_state; test_state.run_and_save({str(folder)!r})"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    process.kill()
    process.communicate()
    return folder


@every_rule
def test_a_killed_process_is_continued_by_another(write: str, saved_states: Path) -> None:
    generator = LMGen(build(write), use_sampling=False)
    with generator.streaming(2):
        steps = [generator.step(user_codes()[:, :, t : t + 1]) for t in range(NUM_FRAMES)]
        final = ttt.get_state(generator, whole=True)
    with generator.streaming(2):
        ttt.set_state(generator, load_file(saved_states / f"{write}.safetensors"))
        continued = [
            generator.step(user_codes()[:, :, t : t + 1]) for t in range(SAVE_FRAMES, NUM_FRAMES)
        ]
        assert_equal_states(ttt.get_state(generator, whole=True), final)
    for a, b in zip(continued, steps[SAVE_FRAMES:], strict=True):
        assert torch.equal(a, b)


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_what_was_learned_is_carried_into_a_new_stream_alone() -> None:
    model = build("sum")
    codes = random_codes(num_frames=12)
    with torch.no_grad(), model.streaming(2):
        model.forward_text(codes)
        learned = ttt.get_state(model)
    assert {name.split(".")[3] for name in learned} == {"gating"}
    with torch.no_grad(), model.streaming(2):
        ttt.set_state(model, learned)
        assert_equal_states(ttt.get_state(model), learned)
        state = ttt.get_state(model, whole=True)
        assert state["transformer.layers.0.self_attn.kv_cache.end_offset"].tolist() == [0, 0]


@pytest.mark.parametrize("rows", [[1], [False, True], torch.tensor([False, True])])
def test_rows_forget_alone(rows: list[int] | torch.Tensor) -> None:
    model = build("sum")
    with torch.no_grad(), model.streaming(2):
        model.forward_text(random_codes(num_frames=12))
        model.set_exec_mask(torch.tensor([True, False]))
        before = ttt.get_state(model, whole=True)
        ttt.reset(model, rows)
        after = ttt.get_state(model, whole=True)
        for name in before:
            if name.endswith((".change", ".num_pending")):
                assert torch.equal(after[name][0], before[name][0])
                assert before[name][1].abs().max() > 0 and after[name][1].abs().max() == 0
            elif ".pending" in name:
                assert torch.equal(after[name][0], before[name][0]) and not after[name][1].any()
            else:
                assert torch.equal(after[name], before[name])
        ttt.reset(model)
        assert ttt.get_state(model)["transformer.layers.0.gating.change"].abs().max() == 0


@every_rule
def test_a_row_without_ttt_is_so_for_its_stream_alone(write: str) -> None:
    model = build(write)
    codes = random_codes(num_frames=12)
    with torch.no_grad(), model.streaming(2):
        expected = model.forward_text(codes)[0][:1]
    with torch.no_grad(), model.streaming(2):
        ttt.use_in_rows(model, torch.tensor([False, True]))
        assert not torch.equal(model.forward_text(codes)[0][:1], expected)
    with torch.no_grad(), model.streaming(1):
        torch.testing.assert_close(model.forward_text(codes[:1])[0], expected)


def test_what_cannot_be_restored_is_one_clear_error() -> None:
    model = build("sum")
    with pytest.raises(ValueError, match="not streaming"):
        ttt.get_state(model)
    with model.streaming(2):
        state = ttt.get_state(model)
    with model.streaming(3), pytest.raises(ValueError, match=r"does not fit .*\[2\], .*\[3\]"):
        ttt.set_state(model, state)
    with pytest.raises(ValueError, match="not streaming"):
        ttt.set_state(model, state)
    other = build("delta")
    message = r"it lacks transformer\S*pending_read, transformer\S*pending_read\."
    with other.streaming(2), pytest.raises(ValueError, match=message):
        ttt.set_state(other, state)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("transformer.layers.0.gating.change", torch.bfloat16),
        ("transformer.layers.0.gating.change", torch.int8),
        ("transformer.layers.0.gating.num_pending", torch.float32),
        ("transformer.layers.0.gating.exec_mask", torch.int64),
        ("transformer.layers.1.self_attn.kv_cache.cache", torch.float64),
        ("transformer.layers.1.offset_cpu", torch.float32),
    ],
)
def test_a_state_of_another_type_is_refused_and_changes_nothing(
    name: str, dtype: torch.dtype
) -> None:
    model = build("sum")
    with torch.no_grad(), model.streaming(2):
        model.forward_text(random_codes(num_frames=13))
        before = ttt.get_state(model, whole=True)
        other = {key: torch.zeros_like(value) for key, value in before.items()}
        other[name] = other[name].to(dtype)
        kinds = f"is {dtype} .*, and the stream's is {before[name].dtype} ".replace("torch.", "")
        with pytest.raises(ValueError, match=f"does not fit this stream: {name} {kinds}"):
            ttt.set_state(model, other)
        assert_equal_states(ttt.get_state(model, whole=True), before)
