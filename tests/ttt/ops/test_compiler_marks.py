"""Functions marked for torch.compile, in compiled code and without any."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from ttt.ops.compiler_marks import constant_result, uncompiled

EAGER = """
import sys, torch
from ttt.ops import in_place_ttt
z = torch.randn(1, 4, 3)
in_place_ttt(z, z, lr=0.1, chunk_size=2)
print("torch._dynamo" in sys.modules)
"""


def test_without_compiled_code_the_compiler_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", EAGER], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_compiled_code_stops_before_what_is_not_compiled_and_goes_on_behind_it() -> None:
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([node.target.__name__ for node in graph.graph.nodes if "call" in node.op])
        return graph.forward

    @uncompiled
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def whole(x: torch.Tensor) -> torch.Tensor:
        return double(x + 1) - 3

    x = torch.arange(3.0)
    assert torch.equal(torch.compile(whole, backend=backend)(x), 2 * x - 1)
    assert graphs == [["add"], ["sub"]]
    torch._dynamo.reset()  # or the code above would serve
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(whole, backend=backend, fullgraph=True)(x)


def test_compiled_code_takes_a_constant_result_as_it_was() -> None:
    torch._dynamo.reset()
    answers = [1]
    constant = constant_result(lambda: answers[0])

    @torch.compile(backend="eager", fullgraph=True)
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + constant()

    assert add(torch.zeros(1)).item() == 1
    answers[0] = 2
    assert add(torch.zeros(1)).item() == 1
