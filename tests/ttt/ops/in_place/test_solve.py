"""The kernel of products with inverses against the plain form, on a CUDA device or interpreted."""

from typing import Any

import pytest
import torch
from interpreted import DEVICE, calls_the_interpreter, on_a_device, run_interpreted

from ttt.ops.in_place import delta_window, terms
from ttt.ops.in_place.solve import Solver

WIDTH = 70


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "21 passed" in run_interpreted(__file__)


def inverses_of(keys: torch.Tensor, beta: float = 10.0) -> torch.Tensor:
    """[N, n, C, C] in float32, of keys [N, n, C, h]."""
    gram = keys.double() @ keys.double().mT
    return delta_window.inverse(gram, beta)[0].float()


def solver_of(inverses: torch.Tensor, device: str, monkeypatch: Any, **options: Any) -> Solver:
    has_kernels = device != "plain"
    monkeypatch.setattr(terms, "has_kernels", lambda x: has_kernels)
    place = DEVICE if has_kernels else "cpu"
    solver = Solver(inverses.to(place), dtype=torch.bfloat16, **options)
    assert (solver.halves is not None) == has_kernels
    return solver


def assert_close(made: torch.Tensor, plain: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Two terms of bfloat16 have 16 bits."""
    made, plain = made.cpu().double(), plain.double()
    assert (made - plain).norm() <= tolerance * plain.norm()


def numbers(values: torch.Tensor, low: int) -> torch.Tensor:
    """Return what terms [N, C, 3, d] say, of which that at `low` is the smaller one."""
    return values[:, :, 0].double() + values[:, :, low].double()


CASES = pytest.mark.parametrize(
    "size, lag, has_edge, has_next",
    [
        *((size, 1, True, True) for size in (1, 16, 40, 150)),
        *((40, lag, True, True) for lag in (0, 3)),
        *((40, 1, *given) for given in ((False, True), (True, False), (False, False))),
    ],
)


@on_a_device
@CASES
def test_errors(
    size: int, lag: int, has_edge: bool, has_next: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of columns of very different size; chunks beside the one that is solved are left alone."""
    if lag >= size:
        lag = 0
    torch.manual_seed(0)
    inverses = inverses_of(torch.randn(2, 3, size, 24))
    scale = 10.0 ** torch.linspace(-30, 5, WIDTH)
    v = (scale * torch.randn(2, 3 * size, WIDTH)).bfloat16()[:, size : 2 * size]
    read = (scale * torch.randn(2, 3 * size, WIDTH))[:, size : 2 * size]
    waited = scale * torch.randn(2, lag, WIDTH) if has_edge else None
    again = torch.randn(2, 3, lag, size)[:, 2] if has_next else None
    results = []
    for device in ("plain", "kernels"):
        solver = solver_of(inverses, device, monkeypatch, lag=lag, decay=0.7)
        place = solver.inverses.device
        shape = terms.shape(size, torch.bfloat16)
        e = torch.full((2, 3, *shape, WIDTH), torch.nan, dtype=torch.bfloat16, device=place)
        own_waited, own_again = (x if x is None else x.to(place) for x in (waited, again))
        following = solver.errors(1, v.to(place), read.to(place), own_waited, own_again, e[:, 1])
        assert e[:, 0].isnan().all() and e[:, 2].isnan().all()
        assert (following is not None) == has_next
        results.append((e[:, 1], following))
    (plain, plain_next), (made, made_next) = results
    # Columns are compared one by one.
    for column in range(0, WIDTH, 23):
        one, other = (numbers(e[:, :size, :, column : column + 1].cpu(), 1) for e in (made, plain))
        assert_close(one, other)
        one, other = (numbers(e[:, size:, :, column : column + 1].cpu(), 1) for e in (made, plain))
        assert_close(one, other, 1e-4)
    assert torch.equal(made[:, :, 0], made[:, :, 2])
    if made_next is not None and plain_next is not None and lag:
        for column in range(0, WIDTH, 23):
            assert_close(made_next[..., column], plain_next[..., column])


@on_a_device
@CASES
def test_adjoints(
    size: int, lag: int, has_edge: bool, has_next: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lag >= size:
        lag = 0
    torch.manual_seed(0)
    inverses = inverses_of(torch.randn(2, 3, size, 24))
    everything = torch.randn(2, 3 * size, WIDTH)
    again = torch.randn(2, 3, lag, size)[:, 2] if has_next else None
    results = []
    for device in ("plain", "kernels"):
        solver = solver_of(inverses, device, monkeypatch, lag=lag, decay=0.7)
        place = solver.inverses.device
        x = everything.to(place, copy=True)
        following = x[:, 2 * size : 2 * size + lag] if has_next else None
        left, d_v = (
            torch.full(shape, torch.nan, dtype=torch.bfloat16, device=place)
            for shape in ((2, 3, size, 3, WIDTH), (2, 3 * size, WIDTH))
        )
        here = slice(size, 2 * size)
        own_again = None if again is None else again.to(place)
        solver.adjoints(1, x[:, here], following, own_again, left[:, 1], d_v[:, here])
        for part in (slice(size), slice(2 * size, 3 * size)):
            assert torch.equal(x[:, part].cpu(), everything[:, part])
            assert d_v[:, part].isnan().all()
        assert left[:, 0].isnan().all() and left[:, 2].isnan().all()
        assert torch.equal(left[:, 1, :, 0], left[:, 1, :, 1])
        # Triton's interpreter cuts digits off where a GPU rounds.
        torch.testing.assert_close(d_v[:, here].float(), x[:, here], rtol=2**-7, atol=0)
        assert_close(numbers(left[:, 1].cpu(), 2), x[:, here].cpu())
        results.append(x[:, here])
    assert_close(results[1], results[0])


@on_a_device
@pytest.mark.parametrize("kind", ["one frame", "two frames", "noise"])
def test_products_are_as_precise_as_those_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where targets are alike and cancel each other, against float64 with the same inverse."""
    torch.manual_seed(0)
    size = 128
    frames = torch.randn({"one frame": 1, "two frames": 2, "noise": size}[kind], 64)
    keys = frames[torch.arange(size) % len(frames)].expand(1, 1, -1, -1)
    inverses = inverses_of(keys, 100.0)
    v = torch.randn(1, 1, WIDTH).bfloat16().expand(1, size, -1).contiguous()
    exact = inverses[:, 0].double() @ v.double()
    distances = []
    for device in ("plain", "kernels"):
        solver = solver_of(inverses, device, monkeypatch, lag=0, decay=1.0)
        place = solver.inverses.device
        shape = terms.shape(size, torch.bfloat16)
        e = torch.empty(1, 1, *shape, WIDTH, dtype=torch.bfloat16, device=place)
        read = torch.zeros(v.shape, device=place)
        solver.errors(0, v.to(place), read, None, None, e[:, 0])
        found = numbers(e[:, 0, :size].cpu(), 1)
        distances.append(((found - exact).norm() / exact.norm()).item())
    # Two terms of bfloat16 round by 2^-17 in any case.
    assert distances[1] < max(2 * distances[0], 1e-5)


@pytest.mark.parametrize(
    "size, lag, dtype", [(257, 0, torch.bfloat16), (40, 9, torch.bfloat16), (40, 0, torch.float32)]
)
def test_what_the_kernel_does_not_take(
    size: int, lag: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms, "has_kernels", lambda x: True)
    inverses = torch.eye(size).expand(1, 1, -1, -1)
    assert Solver(inverses, lag=lag, decay=1.0, dtype=dtype).halves is None
