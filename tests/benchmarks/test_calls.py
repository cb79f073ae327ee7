"""The benchmarks of calls run, and print no time for what is wrong."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.modules.transformer import StreamingMultiheadAttention

import ttt

CALLS = ["--device=cpu", "--ttt-layers=2", "--frames=18"]


def test_calls_are_timed_whole(
    program: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = program("calls")
    path = tmp_path / "calls.json"
    right, written = calls.write_whole, []

    def watched(path: Path, text: str) -> None:
        written.append(json.loads(text))
        right(path, text)

    calls.write_whole = watched
    found = calls.main([*CALLS, "--callers", "1", "2", "--part-frames=9", f"--out={path}"])
    assert [(line["ttt"], line["callers"], line["begin"]) for line in found] == [
        *[("on", 1, "apart"), ("on", 1, "together"), ("on", 2, "apart"), ("on", 2, "together")],
        *[("off", 1, "together"), ("off", 2, "together")],
    ]
    one, _, two, both, off, _ = found
    assert two["median_ms"] > 0 and (two["frames"], both["frames"]) == (19, 18)
    assert (one["longest_wait_ms"], two["longest_wait_ms"], both["longest_wait_ms"]) == (0, 80, 0)
    # The second chunks of 8 frames; the first are done before anything is timed.
    ends = [{n: t["frames"] for n, t in line["by_chunk_ends"].items()} for line in (two, both)]
    assert ends == [{0: 8, 1: 2}, {0: 9, 2: 1}]
    assert two["changes"] == both["changes"]
    assert two["state_gb"] == pytest.approx(2 * one["state_gb"], rel=0.01)
    assert off["state_gb"] < one["state_gb"]
    assert all(change > 0 for change in two["changes"].values()) and not off["changes"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    parts = [line for line in lines if "health" in line]
    assert [part["frames"] for part in parts] == [9, 18] * 6
    assert parts[1]["health"] and parts[0]["against_first"]["median"] == 1
    assert one["against_first"]["median"] == parts[1]["against_first"]["median"]
    # Of a run that is cut off, what it has measured is there.
    first = written[0]["lines"][0]
    assert first["unfinished_after_frames"] == 9 and len(first["parts"]) == 1
    assert written[-1] == json.loads(path.read_text())
    assert written[-1]["lines"] == json.loads(json.dumps(found))
    with pytest.raises(SystemExit, match="wrong: 1 callers: frame 0: not all is finite"):
        spoil(calls)
        calls.main([*CALLS, "--callers", "1", "--ttt=on"])


def test_calls_that_do_not_fit_are_a_line_and_time_ends(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = program("calls")
    right = StreamingMultiheadAttention._init_streaming_state
    made = []

    def scarce(self: Any, batch_size: int) -> Any:
        made.append(batch_size)
        if batch_size == 2 and made.count(2) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return right(self, batch_size)

    monkeypatch.setattr(StreamingMultiheadAttention, "_init_streaming_state", scarce)
    two, one = calls.main([*CALLS, "--callers", "2", "1", "--ttt=on", "--begin=apart"])
    assert "out of memory" in two["out_of_memory"] and "median_ms" not in two
    assert one["median_ms"] > 0
    one_line = [*CALLS, "--callers", "1", "--ttt=on", "--begin=apart"]
    (none,) = calls.main([*one_line, "--limit-sec=0"])
    assert none["skipped"] == "time was up"


def test_a_call_is_compared_with_a_reference(
    program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model sees 25 frames, and its first chunk ends after 32."""
    calls, same_window = program("calls"), program("same_window")
    for name, frames in {"LOOK_FRAMES": 8, "BEYOND_FRAME": 36, "BLOCK_FRAMES": 7}.items():
        monkeypatch.setattr(same_window, name, frames)
    memory = Path(__file__).parents[2] / "example/memory"
    call = [f"--checkpoint={memory}", "--device=cpu", "--callers=1", "--frames=46"]
    (line,) = calls.main([*call, "--part-frames=20"])
    assert line["reference"]["window_frames"] == 25
    found = line["reference"]["difference_from_frame"]
    assert found.keys() == {0, 20, 36, 40} and max(found.values()) < 1e-4
    # A reference that has not learned is another, once the call has.
    right = same_window.block_streaming

    @contextmanager
    def forgetful(model: Any, *args: Any) -> Iterator[None]:
        with ttt.without_ttt(model), right(model, *args):
            yield

    monkeypatch.setattr(same_window, "block_streaming", forgetful)
    with pytest.raises(SystemExit, match=r"from frame 36 on the text logits are .* from the ref"):
        calls.main([*call, "--part-frames=20"])


@pytest.mark.slow
def test_spoken_recall_is_timed_whole(
    program: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("calls")
    recall = program("spoken_recall")
    short = ["--device=cpu", "--ttt-layers=1", "--talks=1", "--distances=10", "--facts=1"]
    short += ["--answer-sec=1", "--batch-size=3", f"--out={tmp_path / 'recall.json'}"]
    line = recall.main(short)
    # One talk in three arms, side by side: some fourteen seconds.
    assert line["rows"] == 3 and 160 < line["steps"] < 200
    assert 0 < line["median_ms"] < line["whole_ms_per_step"] * 2 and line["learned"] > 0
    assert json.loads((tmp_path / "recall.json").read_text()) == line
    nothing = {"num_talks": 0, "num_unhealthy": 0}
    monkeypatch.setattr(recall.TASK, "run", lambda *_: nothing)
    with pytest.raises(SystemExit, match="wrong: 0 talks heard"):
        recall.main(short)


def spoil(calls: Any) -> None:
    """A model whose weights are no numbers."""
    right = calls.make_model

    def broken(*args: Any) -> Any:
        model = right(*args)
        model.transformer.layers[0].self_attn.in_projs[0].weight.data.fill_(float("nan"))
        return model

    calls.make_model = broken
