"""The attention of the fast path: windows, positions, and what its kernels compute and take."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moshi.modules.rope import apply_rope
from moshi.utils.compile import no_compile
from torch.utils._python_dispatch import TorchDispatchMode

from ttt.ops.moshi import attention
from ttt.ops.moshi.attention import causal_attention
from ttt.ops.moshi.depth_attention import depth_attention
from ttt.ops.rope import rope_table, rotate

# --- attention ------------------------------------------------------------------------------------


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int
) -> torch.Tensor:
    """With a mask of all pairs."""
    frames = torch.arange(q.shape[1])
    distance = frames[:, None] - frames
    visible = (distance >= 0) & (distance < context)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


@pytest.mark.parametrize("context", [1, 2, 5, 8, 22, 23, 40])
def test_a_window_equals_the_masked_form(context: int) -> None:
    inputs = [torch.randn(2, 23, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = inputs
    found = causal_attention(q, k, v, context)
    expected = masked_attention(q, k, v, context)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_window_takes_less_than_all_pairs() -> None:
    class Counter(TorchDispatchMode):
        pairs = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "scaled_dot_product" in str(func):
                self.pairs += args[0].shape[2] * args[1].shape[2]
            return func(*args, **(kwargs or {}))

    pairs: dict[int, int] = {}
    for context in (10, 50, 200):
        with Counter() as counter:
            q, k, v = (torch.randn(1, 200, 1, 8) for _ in range(3))
            causal_attention(q, k, v, context)
        pairs[context] = counter.pairs
    assert pairs[10] < pairs[50] / 3 < pairs[200] / 3


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_moshis_to_the_bit(interleave: bool, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 2, 7, 3, 8).to(dtype)
    table = rope_table(torch.arange(7)[:, None], 8, 1000.0, interleave=interleave)
    with no_compile():
        expected = apply_rope(q, k, torch.zeros(2, dtype=torch.long), 1000.0, interleave, True)
    for x, turned in zip((q, k), expected, strict=True):
        assert torch.equal(rotate(x, table, interleave=interleave), turned)


def test_steps_of_different_frames_do_not_see_each_other() -> None:
    qkv = torch.randn(5, 7, 3 * 8, dtype=torch.float64)
    out = depth_attention(qkv, num_heads=2)
    for frame in range(7):
        q, k, v = qkv[:, frame].view(1, 5, 3, 2, 4).unbind(2)
        expected = masked_attention(q, k, v, context=5)[0].flatten(1)
        torch.testing.assert_close(out[:, frame], expected)


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda x: contextlib.nullcontext()
from ttt.ops.moshi import depth_kernels
from ttt.ops.moshi.depth_attention import depth_attention
for steps, frames, heads, width in [(8, 19, 2, 16), (5, 9, 1, 32)]:
    qkv = torch.randn(steps, frames, 3 * heads * width, requires_grad=True)
    out = depth_attention(qkv, heads)
    d_out = torch.randn_like(out)
    (d_qkv,) = torch.autograd.grad(out, qkv, d_out)
    poison = torch.empty_like
    torch.empty_like = lambda x: torch.full_like(x, float("nan"))
    torch.testing.assert_close(depth_kernels.forward(qkv.detach(), heads), out)
    torch.testing.assert_close(depth_kernels.backward(d_out, qkv.detach(), heads), d_qkv)
    torch.empty_like = poison
"""


def test_the_kernels_of_depth_attention_as_interpreted() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[3]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- flash attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_compiled_code_asks_what_the_device_can_do(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._capability.cache_clear()

    @torch.compile(backend="eager", fullgraph=True)
    def answer(x: torch.Tensor) -> Any:
        return x + 1 if attention._has_flash(x.device) else x - 1

    assert answer(torch.zeros(1)).item() == (1 if capability >= (8, 0) else -1)
    attention._capability.cache_clear()


def test_flash_attention_gets_what_it_takes() -> None:
    def suits(width: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return attention._suits_flash(torch.empty(1, 1, 1, width, dtype=dtype))

    assert suits(128) and suits(256) and suits(64, torch.float16)
    assert not suits(12) and not suits(264) and not suits(64, torch.float32)
