"""Checks of the In-Place operators' arguments. Nothing is asked of a device, so only numbers of
Python and shapes are looked at."""

from torch import Tensor


def check_sequence(
    z: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    decay: float,
    lag: int,
    documents: Tensor | None,
    written: Tensor | None = None,
    projection: Tensor | None = None,
) -> None:
    """
    Raises:
        ValueError: an argument of `in_place_ttt` or `in_place_delta` out of range or shape.
    """
    check_chunk_size(chunk_size)
    if not 0 <= lag < chunk_size:
        raise ValueError(
            f"lag: must lie between 0 and chunk_size - 1 = {chunk_size - 1}, got {lag}"
        )
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: must lie between 0 and 1, got {decay}")
    frames = tuple(z.shape[:2])
    if z.dim() != 3:
        raise ValueError(f"z: must be [B, T, h], got {_shape(z)}")
    if v.dim() != 3 or v.shape[:2] != frames:
        raise ValueError(f"v: must be [B, T, d] with z's {list(frames)} as [B, T], got {_shape(v)}")
    for name, x in (("documents", documents), ("written", written)):
        if x is not None and x.shape != frames:
            raise ValueError(f"{name}: must be [B, T] = {list(frames)}, got {_shape(x)}")
    if projection is not None and projection.shape != (v.shape[2], v.shape[2]):
        width = v.shape[2]
        raise ValueError(f"projection: must be [d, d] = {[width] * 2}, got {_shape(projection)}")


def check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")


def check_beta(beta: Tensor | float) -> None:
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            raise ValueError(
                f"beta: must be a number, or a tensor of one element, got {_shape(beta)}"
            )
    elif not beta > 0:
        raise ValueError(f"beta: must be more than 0, got {beta}")


def check_norm(max_delta_norm: float | None) -> None:
    if max_delta_norm is not None and not max_delta_norm > 0:
        raise ValueError(f"max_delta_norm: must be more than 0, or None, got {max_delta_norm}")


def check_lookahead(lookahead: int, kernel_size: int) -> None:
    if not 0 <= lookahead < kernel_size:
        raise ValueError(
            f"lookahead: must lie between 0 and K - 1 = {kernel_size - 1}, got {lookahead}"
        )


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
