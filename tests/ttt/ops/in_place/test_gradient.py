"""The kernel of gradients to products against the plain form, on a CUDA device or interpreted."""

from typing import Any

import pytest
import torch
from interpreted import DEVICE, calls_the_interpreter, on_a_device, run_interpreted
from test_sum import sizes

from ttt.ops.in_place import chunks, delta_gradient, delta_window, terms

SIZE, WIDTH, HIDDEN = 12, 24, 16


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "12 passed" in run_interpreted(__file__)


@on_a_device
@pytest.mark.parametrize("num_frames", [SIZE * 7, SIZE * 6 + 5])
@pytest.mark.parametrize("super_chunk", [4 * SIZE, 2048])
@pytest.mark.parametrize("lag, decay", [(0, 1.0), (1, 0.8), (5, 1.0)])
def test_terms_of_the_gradient(
    lag: int, decay: float, super_chunk: int, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all windows of a row, the first and those after it."""
    torch.manual_seed(0)
    z = torch.randn(2, num_frames, HIDDEN).bfloat16()
    written = torch.rand(2, num_frames) < 0.8
    beta = torch.tensor(10.0)
    with sizes(super_chunk, 2 * SIZE):
        cut = chunks.cut(num_frames, SIZE, WIDTH, HIDDEN, decay, lag, batch=2)
    windows = [window for group in cut.windows(2) for window in group]
    assert cut.is_whole == (super_chunk > num_frames)
    for window in windows:
        monkeypatch.setattr(terms, "has_kernels", lambda x: False)
        rows = window.own(written)
        kept = delta_window.prepare(window.frames(z), rows, beta, window, cut)
        count, num_chunks = window.length // SIZE, -(-window.length // SIZE)
        batch, shape = len(rows), terms.shape(SIZE, torch.bfloat16)
        x, e, y = (
            torch.empty(batch, n, *shape, WIDTH, dtype=torch.bfloat16)
            for n in (count, count, num_chunks)
        )
        for chunk in range(num_chunks):
            here = slice(chunk * SIZE, min(window.length, (chunk + 1) * SIZE))
            values = torch.randn(batch, here.stop - here.start, WIDTH)
            terms.of_values(values, SIZE, y[:, chunk], swap=True)
            if chunk < count:
                terms.of_values(torch.randn(batch, SIZE, WIDTH), SIZE, x[:, chunk], swap=True)
                terms.of_values(torch.randn(batch, SIZE, WIDTH), SIZE, e[:, chunk])
        results: list[Any] = []
        for place, has_kernels in (("cpu", False), (DEVICE, True)):
            monkeypatch.setattr(terms, "has_kernels", lambda x, found=has_kernels: found)
            own_kept = delta_window.Kept(*(t.to(place) for t in kept))
            own_x, own_y, own_e, own_beta = (t.to(place) for t in (x, y, e, beta))
            results.append(
                delta_gradient.of_products(own_kept, own_x, own_y, own_e, own_beta, window, cut)
            )
        (plain, plain_strengths), (made, made_strengths) = results
        # Sums of 288 products of about 1, of terms that the interpreter cuts rather than rounds.
        torch.testing.assert_close(made_strengths.cpu(), plain_strengths, rtol=1e-3, atol=2e-3)
        assert [part.shape for part in made] == [part.shape for part in plain]
        assert made[0].float().norm() < 2**-7 * made[1].float().norm()
        total, exact = (sum(part.cpu().double() for part in parts) for parts in (made, plain))
        assert torch.equal(total, total.mT)
        # Everywhere, the few numbers near chunks' edges as well.
        assert (total - exact).abs().max() < 1e-4 * exact.abs().max()
