"""The tables of precision are made anew, and show what is not precise."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def precision(program: Callable[..., Any]) -> ModuleType:
    return program("precision")


@pytest.mark.parametrize("device", DEVICES)
def test_all_tables_are_made(
    precision: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    path = tmp_path / "precision.json"
    precision.main(["--tiny", "--device", device, "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    tables: dict[str, list[Any]] = {}
    for result in results:
        tables.setdefault(result["table"], []).append(result)
    assert {table: len(rows) for table, rows in tables.items()} == {
        **{"values": 4, "gradients": 21, "models": 14, "strength": 7},
    }
    for row in tables["values"]:
        assert 1e-4 < max(row["bfloat16"]) < 1e-2 and max(row["float32"]) < 1e-3, row
    for row in tables["gradients"]:
        if row["keys"].startswith("cosine"):
            # The gradient of β may be small beside what it is the sum of.
            assert 1e-4 < max(row["bfloat16, lag 1"][:3]) < 1e-2, row
            assert max(row["float32, lag 1"][:3]) < 1e-3, row
    for row in tables["models"]:
        for target in ("text", "hidden"):
            is_exact = row["compared"].startswith("float32")
            distance = row[target]["distance"]
            # Streams whose calls differ in length alone may be equal to the bit.
            assert distance > 0 or row["compared"].count(" in calls of ") == 2, row
            assert distance < (1e-4 if is_exact else 0.1), row
            assert row[target].get("same_best_token", 1) > 0.8, row
    strongest = tables["strength"][-1]
    assert strongest["silence, float32"] > 10 * strongest["cosine 0.94, float32"]

    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == len(results) + 2 * len(tables)


def test_arithmetic_that_is_not_precise_is_seen(
    precision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = precision.ops.in_place_delta

    def rough(z: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = right(z, v, **options)
        return out if z.dtype == torch.float64 else 1.1 * out

    monkeypatch.setattr(precision.ops, "in_place_delta", rough)
    found = precision.main(["--tiny", "--device=cpu", "--tables", "gradients"])
    assert {row["table"] for row in found} == {"gradients"}
    for row in found:
        assert row["float32, lag 1"][0] == pytest.approx(0.1, rel=0.01)
        assert row["bfloat16, lag 1"][0] == pytest.approx(0.1, rel=0.1)


def test_nothing_is_measured_against_a_wrong_float64(
    precision: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = precision.ops.in_place_delta
    monkeypatch.setattr(
        precision.ops,
        "in_place_delta",
        lambda *args, **options: (1 + 1e-6) * right(*args, **options),
    )
    with pytest.raises(SystemExit, match="float64 on cpu differs from the definition"):
        precision.main(["--tiny", "--device=cpu"])
    assert "|" not in capsys.readouterr().out
