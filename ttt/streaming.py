"""Streaming in blocks of several steps, as one long forward pass would compute them."""

from collections.abc import Iterator
from contextlib import contextmanager

from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from moshi.utils.compile import CUDAGraphed


@contextmanager
def eager_streaming(module: StreamingModule, batch_size: int) -> Iterator[None]:
    """Streaming mode without CUDA graphs.

    Moshi's own switch, `no_cuda_graph`, is one for all threads: of two that enter and leave it, the
    last decides what it is set to. This is of these streams alone.
    """
    with module.streaming(batch_size):
        for child in module.modules():
            state = child._streaming_state if isinstance(child, StreamingModule) else None
            for graphed in vars(state).values() if state is not None else ():
                if isinstance(graphed, CUDAGraphed):
                    graphed.disable = True
        yield


@contextmanager
def block_streaming(module: StreamingModule, batch_size: int, block_steps: int) -> Iterator[None]:
    """Streaming mode in which up to `block_steps` steps may be fed at once, exactly.

    A stock attention cache holds as many steps as the attention sees, so that of a block longer
    than one step the first queries miss their oldest keys: those that the block's last steps have
    just overwritten. Here the caches are that much longer; what attention sees is unchanged.

    Args:
        module: a model, or a Mimi, whose attention has a window (or none, and a cache that grows).
        block_steps: of the module's transformer; Mimi's has two a frame.
    """
    # A graph would be captured anew for every batch, and cannot take blocks of different lengths.
    with eager_streaming(module, batch_size):
        lengthen_caches(module, block_steps)
        yield


def lengthen_caches(module: StreamingModule, block_steps: int) -> None:
    """Make room in a stream's attention caches for blocks of `block_steps` steps; before its first
    step."""
    for child in module.modules():
        if isinstance(child, StreamingMultiheadAttention):
            _lengthen_cache(child, block_steps)


def _lengthen_cache(attention: StreamingMultiheadAttention, block_steps: int) -> None:
    state = attention._streaming_state
    if state is None or state.kv_cache is None or attention.weights_per_step:
        return
    _, batch_size, num_heads, _, width = state.kv_cache.cache.shape
    state.kv_cache = RingKVCache(
        batch_size,
        num_heads,
        width,
        attention.context + block_steps - 1,
        device=state.kv_cache.cache.device,
        dtype=state.kv_cache.cache.dtype,
    )
