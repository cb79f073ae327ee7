"""The kernels of terms and inverses against the plain form, on a CUDA device or interpreted."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreted import DEVICE, calls_the_interpreter, on_a_device, run_interpreted
from test_sum import sizes

from ttt import ops
from ttt.ops.in_place import delta_window, terms

pytest.importorskip("triton")

PRODUCTS = torch.backends.cuda.matmul


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "27 passed" in run_interpreted(__file__)


def assert_same_terms(
    made: torch.Tensor, plain: torch.Tensor, *, low: int, dim: int, ends: tuple[int, int]
) -> None:
    """Kernels add in another order and the interpreter rounds otherwise: sums of terms are alike.

    Args:
        ends: where a mean or sum and its rest are, in the dimension next to that of terms.
    """
    high = [i for i in range(3) if i != low]
    assert torch.equal(made.select(dim, high[0]), made.select(dim, high[1]))
    both: list[Any] = [
        x.select(dim, high[0]).double() + x.select(dim, low).double() for x in (made.cpu(), plain)
    ]
    for x in both:
        # What two terms leave of a number depends on how they were rounded.
        whole, rest = (x.select(-1 if dim == -1 else 1, end) for end in ends)
        whole += rest
        rest.zero_()
    torch.testing.assert_close(*both, rtol=2**-14, atol=2**-14)
    # Together: a sum whose numbers cancel each other has what they were rounded by, whatever it is.
    a, b = (x.select(-1 if dim == -1 else 1, ends[0]) for x in both)
    assert (a - b).norm() <= 2**-20 * b.norm()


@on_a_device
@pytest.mark.parametrize("swap", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(
    "size, rows, columns, skip, shift",
    [(16, 40, 70, 1, 0), (12, 5, 30, 0, 2), (256, 33, 500, 3, 1), (1030, 9, 1500, 1, 1)],
)
def test_weights(
    size: int,
    rows: int,
    columns: int,
    skip: int,
    shift: int,
    swap: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a matrix whose rows, or with `swap` columns, lie apart in memory."""
    torch.manual_seed(0)
    x = 3 + torch.randn(2, rows, columns + 8)[:, :, :columns]
    x = x.mT.contiguous().mT if swap else x
    options: dict[str, Any] = {"skip": skip, "shift": shift, "swap": swap}
    plain = terms.of_weights(x, size, torch.bfloat16, **options)
    monkeypatch.setattr(terms, "has_kernels", lambda x: True)
    made = terms.of_weights(x.to(DEVICE), size, torch.bfloat16, **options)
    assert made.shape == plain.shape == (2, skip + rows, *plain.shape[2:])
    assert_same_terms(made, plain, low=1 if swap else 2, dim=-1, ends=(size, size + 1))
    assert made[:, :skip].abs().sum() == 0


@on_a_device
@pytest.mark.parametrize("swap", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("length, less_length", [(40, 39), (33, None)])
def test_values(
    length: int, less_length: int | None, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 or 32 bits, less other values in part of the rows; and these rounded, if asked for."""
    torch.manual_seed(0)
    size, width = 40, 70
    x = torch.randn(2, 3 * length, width)[:, length : 2 * length]
    x = x if less_length is None else x.bfloat16()
    less = None if less_length is None else torch.randn(2, 50, width)[:, 1 : 1 + less_length]
    results: list[Any] = []
    rounded_results: list[Any] = []
    for device, has_kernels in (("cpu", False), (DEVICE, True)):
        monkeypatch.setattr(terms, "has_kernels", lambda x, found=has_kernels: found)
        shape = terms.shape(size, torch.bfloat16)
        out = torch.full((2, 2, *shape, width), torch.nan, dtype=torch.bfloat16, device=device)
        own_less = None if less is None else less.to(device)
        rounded = torch.full((2, size, width), torch.nan, dtype=torch.bfloat16, device=device)
        also = {"rounded": rounded[:, :length]} if swap else {}
        terms.of_values(x.to(device), size, out[:, 1], less=own_less, swap=swap, **also)
        assert out[:, 0].isnan().all() and rounded[:, length:].isnan().all()
        assert rounded.isnan().all() == (not swap)
        results.append(out[:, 1])
        rounded_results.append(rounded[:, :length].cpu())
    plain, made = results
    torch.testing.assert_close(*rounded_results, rtol=2**-7, atol=0, equal_nan=True)
    assert_same_terms(made, plain, low=2 if swap else 1, dim=2, ends=(size, size + 2))


@on_a_device
def test_terms_of_rows_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, 96, device=DEVICE)[1:, 2:, :90]
    monkeypatch.setattr(terms, "has_kernels", lambda x: True)
    high, low = terms.split(x, torch.bfloat16)
    assert high.shape == low.shape == x.shape and high.stride() == low.stride() == x.stride()
    torch.testing.assert_close(high.float(), x, rtol=2**-7, atol=0)
    assert 0 < low.abs().max() < 2**-5
    torch.testing.assert_close(high.float() + low.float(), x, rtol=2**-14, atol=0)


@on_a_device
@pytest.mark.parametrize("size", [1, 40, 64, 150])
def test_inverses(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that are much alike, some of them zero; a silent chunk has none."""
    torch.manual_seed(0)
    z = torch.ones(8) + 0.05 * torch.randn(2, 3, size, 8)
    z[0, 1, size // 2 :] = 0
    z[1, 2] = 0
    gram = z.double() @ z.double().mT
    exact, *_ = delta_window.inverse(gram, 10.0)
    monkeypatch.setattr(delta_window, "has_factor_kernel", lambda matrix: True)
    made, *_ = delta_window.inverse(gram.float().to(DEVICE), 10.0)
    torch.testing.assert_close(made.cpu().double(), exact, rtol=1e-3, atol=1e-4)
    assert made[1, 2].abs().max() == 0


@on_a_device
@pytest.mark.parametrize("lag, is_first", [(0, False), (1, True), (5, True), (5, False)])
def test_what_inverses_are_multiplied_with(
    lag: int, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chunk among others, in tensors whose rows lie apart."""
    torch.manual_seed(0)
    size, width, chunk = 20, 300, slice(1, 21)
    v, read, x = (torch.randn(2, 50, width) for _ in range(3))
    first, following = (torch.randn(2, lag + 3, width)[:, :lag] for _ in range(2))
    again = torch.randn(2, lag, 2 * size)[:, :, :size]
    results: list[list[torch.Tensor]] = []
    for device, has_kernels in (("cpu", False), (DEVICE, True)):
        monkeypatch.setattr(terms, "has_kernels", lambda x, found=has_kernels: found)
        own = [t.to(device) for t in (v.bfloat16(), read, first, x, again, following)]
        own_v, own_read, own_first, own_x, own_again, own_following = own
        residual = delta_window._residual(
            own_v[:, chunk], own_read[:, chunk], own_first if is_first else None, lag
        )
        received = delta_window._received(own_x[:, chunk], own_again, own_following)
        results.append([residual.cpu(), received.cpu()])
    for made, plain in zip(*reversed(results), strict=True):
        torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-5)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN until something is written to them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_a_device
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("super_chunk", [8, 2048])
@pytest.mark.parametrize("lag, decay", [(0, 1.0), (3, 1.0), (1, 0.8)])
def test_the_operator_by_its_kernels(
    lag: int, decay: float, super_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of two rows, the last chunk incomplete, against float64."""
    torch.manual_seed(0)
    common = torch.randn(24)
    inputs = [common + 0.3 * torch.randn(2, 18, 24), torch.randn(2, 18, 8), torch.randn(2, 18, 8)]
    results: list[Any] = []
    for device, dtype, has_kernels in (
        ("cpu", torch.float64, False),
        (DEVICE, torch.bfloat16, True),
    ):
        for module, name in ((terms, "has_kernels"), (delta_window, "has_factor_kernel")):
            monkeypatch.setattr(module, name, lambda x, found=has_kernels: found)
        z, v, d_out = (x.bfloat16().to(device, dtype) for x in inputs)
        leaves = [z.requires_grad_(), v.requires_grad_()]
        with sizes(super_chunk, 8):
            out = ops.in_place_delta(z, v, beta=10.0, chunk_size=4, lag=lag, decay=decay)
        grads = torch.autograd.grad(out, leaves, d_out)
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    exact, made = results
    for low, high in zip(made, exact, strict=True):
        assert (low - high).norm() < 0.02 * high.norm()


@pytest.fixture
def _with_tf32() -> Iterator[None]:
    """A program that allows it."""
    before, PRODUCTS.fp32_precision = PRODUCTS.fp32_precision, "tf32"
    yield
    PRODUCTS.fp32_precision = before


def watched(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """What products of float32 may be at each call of a function from now on."""
    seen: list[str] = []
    function = getattr(module, name)

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(PRODUCTS.fp32_precision)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, look)
    return seen


@pytest.mark.usefixtures("_with_tf32")
def test_products_of_float32_have_all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards, whatever a program allows elsewhere; what it allows is as before
    afterwards."""
    forwards = watched(monkeypatch, delta_window, "inverse")
    backwards = watched(monkeypatch, delta_window, "write_backward")
    z = torch.randn(1, 8, 4, requires_grad=True)
    out = ops.in_place_delta(z, torch.randn(1, 8, 4), beta=1.0, chunk_size=4)
    assert PRODUCTS.fp32_precision == "tf32"
    out.sum().backward()
    ops.chunk_errors(z.detach(), z.detach(), 1.0)
    assert PRODUCTS.fp32_precision == "tf32"
    assert (forwards, backwards) == (["ieee"] * 2, ["ieee"])


@pytest.mark.usefixtures("_with_tf32")
def test_all_threads_have_all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another one leaves while they compute; and the last one restores what was."""
    seen = watched(monkeypatch, delta_window, "inverse")
    z, v = torch.randn(1, 64, 16), torch.randn(1, 64, 8)

    def learn() -> None:
        for _ in range(100):
            ops.in_place_delta(z, v, beta=1.0, chunk_size=8)

    threads = [threading.Thread(target=learn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(seen), {*seen}, PRODUCTS.fp32_precision) == (400, {"ieee"}, "tf32")
