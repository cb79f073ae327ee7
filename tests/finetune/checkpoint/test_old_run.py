"""What an earlier version of the program has left behind still trains on, loads and evaluates.

`fixtures/old_run` says what it is. The numbers here are those of the version that made it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import checkpoint, logged, random_batch

from finetune.cli import evaluate, run, train
from finetune.inference import load_for_inference

OLD_RUN = Path(__file__).parents[2] / "fixtures/old_run"
ROUNDING: dict[str, Any] = {"delta": 1e-5, "sum": 5e-4}
"""Relative: `delta` is in float32, and `sum` in bfloat16."""
LOSSES: dict[str, Any] = {
    "delta": [7.536912, 6.873758, 7.503788, 7.123103, 7.514869, 7.068578],
    "sum": [7.541944, 6.878628, 7.555372, 7.219002, 7.631063, 7.215098],
}
"""Losses of the training steps, the last three of them after resuming."""
EVAL_LOSSES: dict[str, Any] = {
    "delta": [7.428782, 7.353116, 7.306698],
    "sum": [7.430925, 7.435552, 7.43126],
}
"""Losses before the first step, after the third, and after resuming at the last."""
TEXT_LOGITS: dict[str, Any] = {
    "delta": [-0.126303, -0.680993, -0.268101, 1.468017, -1.095011],
    "sum": [-0.113281, -0.691406, -0.253906, 1.429688, -1.078125],
}
"""Some logits of one frame, after three chunks, by the weights of the checkpoint."""
POSITION_LOSSES: dict[str, Any] = {
    "delta": {"on": [3.396933, 3.726636, 4.029761], "off": [3.400258, 3.717587, 4.026786]},
    "sum": {"on": [3.445114, 3.771354, 4.060391], "off": [3.444998, 3.762443, 4.057664]},
}
"""Losses of text, the first codebook and the others, as `moshi-ttt evaluate` reports them."""


def near(expected: Any, name: str) -> Any:
    return pytest.approx(expected, rel=ROUNDING[name])


@pytest.fixture(params=["delta", "sum"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a run, in the place from which the paths in its args.yaml start."""
    shutil.copytree(OLD_RUN, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return request.param


def test_an_old_run_trains_on(name: str) -> None:
    assert run(lambda: train(f"{name}/args.yaml", resume="True")) == 0
    assert logged(Path(name)) == near(LOSSES[name], name)
    assert logged(Path(name), kind="eval") == near(EVAL_LOSSES[name], name)
    assert checkpoint(Path(name), 6).is_dir()


def test_an_old_checkpoint_is_the_same_model(name: str) -> None:
    model, _ = load_for_inference(checkpoint(Path(name), 3), "cpu")
    with torch.no_grad():
        logits = model(random_batch(batch=1)).text_logits[0, 0, 10, :5]
    # One step of bfloat16 at a logit of 1 is 0.4 %; a loss is a mean over many.
    assert logits.tolist() == pytest.approx(TEXT_LOGITS[name], rel=10 * ROUNDING[name])


def test_an_old_checkpoint_is_evaluated(name: str) -> None:
    given: dict[str, Any] = {
        "checkpoint": str(checkpoint(Path(name), 3)),
        "out": "out",
        "device": "cpu",
    }
    assert run(lambda: evaluate(**given, tasks="position", arms="on,off", bin_sec="0.4")) == 0
    arms = json.loads(Path("out/results.json").read_text())["position"]["arms"]
    for arm, losses in POSITION_LOSSES[name].items():
        streams = [arms[arm][stream] for stream in ("text", "first_codebook", "other_codebooks")]
        assert [stream["mean"]["value"] for stream in streams] == near(losses, name)
