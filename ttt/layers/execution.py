"""In training the blocks of a model run compiled or not, and keep this or that for the backward
pass."""

import logging
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from moshi.utils import compile as moshi_compile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# The operators that are kept are registered there.
from ttt.ops import frozen as _frozen  # noqa: F401
from ttt.ops.moshi import depth_attention as _depth_attention  # noqa: F401
from ttt.ops.process_setting import ProcessSetting
from ttt.ops.recompute import forward_passes

Checkpointing = bool | Literal["selective"]
"""What is kept for the backward pass: everything (false), the inputs of layers alone (true), or
besides these the results of attention and large products (selective)."""

BACKEND = "inductor"
"""Of torch.compile."""

ROUNDING = "emulate_precision_casts"
"""inductor's option to round where code that is not compiled does. In bfloat16 it otherwise keeps
more digits from one operator to the next, and then the model that trains is another than the one
that is evaluated and streams: what LoRA adds to an output is lost below 1/512 of it there, which in
the first steps is nearly all, and would be kept here. Inductor has it for CUDA alone."""

RECOMPILE_LIMIT = 64
"""Forms that a block can be compiled in, at least: each length of sequences is one of its own, and
so is the first layer, whose input may need no gradient. PyTorch's own limit is 8."""

MIN_KEPT_WIDTH = 512
"""`selective` keeps a product that summed over at least so many numbers: so much arithmetic does a
kept number spare. Products over less, LoRA's among them, cost little to make again."""

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.moshi_ttt.depth_attention.default,
}
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.moshi_ttt.frozen_products.default,
}


_CHECKPOINT_OPTIONS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


@dataclass
class Execution:
    """Execution of a model's blocks, functions of tensors, modules and tuples of these.

    Only what will be differentiated is compiled: in evaluation lengths vary, and every length would
    compile anew.
    """

    checkpointing: Checkpointing = False
    compile: bool = False

    @property
    def makes_layers_again(self) -> bool:
        """Return whether the backward pass makes what a `split_layer` keeps, one layer after the
        other: then it may be much."""
        return self.checkpointing is True

    def layer(self, block: Callable[..., Any], *args: Any) -> Any:
        """`block(*args)`, a whole layer that can be compiled."""
        return self._run(block, self.checkpointing, *args)

    def split_layer(self, function: Callable[..., Any], *args: Any, may_keep: bool) -> Any:
        """`function(*args)`, a layer with something in it that cannot be compiled; all else in it
        runs through `piece`.

        Args:
            may_keep: what cannot be compiled may keep what it has made for the backward pass; see
                `recompute.forward_passes`.
        """
        if self.checkpointing is not True or not torch.is_grad_enabled():
            return function(*args)
        contexts = partial(forward_passes, may_keep=may_keep)
        return checkpoint(function, *args, context_fn=contexts, **_CHECKPOINT_OPTIONS)

    def stock(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, with layers that `blocks` does not know in it: not compiled, and where
        anything is to be made again, then all of it."""
        return _checkpointed(function, self.checkpointing is not False, *args)

    def piece(
        self, block: Callable[..., Any], *args: Any, keeps_products_alone: bool = False
    ) -> Any:
        """`block(*args)`, a piece of a `split_layer`.

        Args:
            keeps_products_alone: where the layer is made again, the backward pass makes all but the
                results of attention and large products once more. It then is one pass over memory
                with what follows from it, where an addition of LoRA and a gate would be two: to
                write a sum for the backward pass, and to read it.
        """
        is_selective = self.checkpointing == "selective"
        is_selective |= keeps_products_alone and self.compile and self.makes_layers_again
        return self._run(block, is_selective and "selective", *args)

    def _run(self, block: Callable[..., Any], mode: Checkpointing, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(*args)
        if self.compile:
            return _compiled(block, BACKEND)(mode, *args)
        return _checkpointed(block, mode, *args)


@cache
def _compiled(block: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A compiled function of a checkpointing mode and `block`'s arguments."""

    def run(mode: Checkpointing, *args: Any) -> Any:
        return _checkpointed(block, mode, *args)

    # A code object of its own for each block: compiled code is kept, and counted, by these.
    run = types.FunctionType(
        run.__code__.replace(co_name=block.__name__), globals(), closure=run.__closure__
    )
    prepare_compilation()
    options: dict[str, Any] = {}
    if backend == "inductor" and torch.cuda.is_available():
        options[ROUNDING] = True
    return torch.compile(
        run, backend=backend, fullgraph=True, dynamic=False, options=options or None
    )


def prepare_compilation() -> None:
    """PyTorch's settings for what is compiled here, of the whole process."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a message is news: of selective checkpointing in compiled code PyTorch says,
    in four lines, that it works for some functions only; the tests hold that it does for these."""
    return "context_fn" not in str(record.msg)


_MOSHI_IS_EAGER = ProcessSetting(
    True,
    read=lambda: bool(moshi_compile._compile_disabled),
    write=lambda value: setattr(moshi_compile, "_compile_disabled", value),
)
"""What `moshi.utils.compile.no_compile` sets, which only one thread may enter at a time."""


def eager_on_cpu(device: torch.device) -> AbstractContextManager[None]:
    """Keeps `moshi` from compiling small functions where it costs more than it brings, and needs
    a C++ compiler: on the CPU."""
    return nullcontext() if device.type == "cuda" else _MOSHI_IS_EAGER.holding()


def _checkpointed(function: Callable[..., Any], mode: Checkpointing, *args: Any) -> Any:
    if mode is False or not torch.is_grad_enabled():
        return function(*args)
    options = dict(_CHECKPOINT_OPTIONS)
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *args, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _ATTENTION or (op in _PRODUCTS and args[0].shape[-1] >= MIN_KEPT_WIDTH):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
