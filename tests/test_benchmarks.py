"""The benchmarks run, and print no speed for what is wrong."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    yield importlib.import_module("ops")
    del sys.modules["ops"]


SMALL = ["--device=cpu", "--dtype=float32", "--width=8", "--hidden=12", "--chunk-size=4"]
SMALL += ["--sizes=2x23"]


def test_operators_are_checked_and_timed(benchmark, tmp_path, capsys):
    path = tmp_path / "ops.json"
    benchmark.main([*SMALL, "--repeats", "1", "--warmup", "0", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert [r["method"] for r in results] == [
        "projection",
        "sum",
        "delta",
        "sum, bf16 weights",
        "sum, fp32 weights",
        "linear, plain scan",
        "linear",
        "mlp, plain scan",
        "mlp",
    ]
    for result in results:
        # Weights in bfloat16 are not float32's equal.
        assert ("forward_backward_ratio" in result) == ("bf16" not in result["method"])
    assert "differs from the reference" in capsys.readouterr().out


def test_a_wrong_operator_gets_no_time(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(
        benchmark.ops, "in_place_ttt", lambda z, v, **_: torch.zeros_like(v) + 0 * v * z.sum()
    )
    found = benchmark.main([*SMALL, "--repeats", "1", "--methods", "sum"])
    assert "wrong" in found[1] and "forward_ms" not in found[1]
