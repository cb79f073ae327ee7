"""A TTT method gives a layer, its streaming state, and what the rest of the program asks of
them. `ttt/registry.py` lists the methods."""

import dataclasses
import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor, nn

from ttt.config import TTTArgs
from ttt.layers.execution import Execution
from ttt.layers.streamed import Streamed
from ttt.ops.autocast import without_autocast
from ttt.registry import METHODS


@dataclass
class TTTState(State):
    """State of one layer: what it has learned in each row's stream, and the frames not yet written.

    A subclass is a dataclass of tensors [B, …]; where a stream does not begin with zeros, it also
    has a `reset`. Each tensor keeps its address and is changed in place: stock `LMGen` captures the
    step in a CUDA graph. What is learned is float32 at least. In rows where `learns` [B] is false
    nothing may change.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # There from the start: a CUDA graph that was captured without it would never look at it.
        self.rows_on = torch.ones_like(self.exec_mask)
        """[B], rows that use TTT; see `ttt.use_in_rows`."""

    @property
    def learns(self) -> Tensor:
        """[B], rows that keep what they hear: those that are neither paused nor without TTT."""
        return self.exec_mask & self.rows_on

    @abstractmethod
    def fast_weights(self) -> tuple[Tensor, ...]:
        """Return the tensors [B, …] that change with every update, and with nothing else."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a stream depends on, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def reset(self, reset_mask: Tensor) -> None:
        """Let the rows of `reset_mask` [B] begin anew."""
        super().reset(reset_mask)
        for tensor in self.tensors().values():
            # All of it: what is not read before it is written again may be NaN, and 0 · NaN is too.
            tensor.masked_fill_(reset_mask.view(-1, *(1 for _ in tensor.shape[1:])), 0)


@dataclass(frozen=True)
class Place:
    """The transformer layer that gets a TTT layer, and the shape of what is to be made for it."""

    block: StreamingTransformerLayer
    width: int
    """d."""
    num_heads: int
    """Attention's."""
    norm: str
    """The kind of norm, as `LMModel` names it."""
    device: torch.device | str | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Cost:
    """Cost of training with a method, beside that without TTT; as measured, if nothing else is
    said, with GPU kernels (docs/benchmarks.md, docs/distributed.md)."""

    time_factor: float
    """Time of a step with TTT in five of 32 layers of Moshi 7B, relative to that without."""
    bytes_per_frame: float
    """Of memory at the peak, for a frame of the batch of a model 4096 wide, beside what the block
    takes anyway: so that the sum is what training steps took, at 16 x 1250 frames. It may be
    negative: the block takes most while the layer is not at work."""
    bytes_per_segment: float
    """Of what it takes so beside that, however short a segment is."""
    kept_time_factor: float
    """`time_factor` where these layers are not made again, with what the others then take."""
    kept_bytes_per_frame: float
    """Of what each of these layers then keeps, beside the results of its products."""
    again_bytes_per_frame: float = 0.0
    """Of what each of these layers keeps for itself where it is made again, for a frame of a
    complete chunk, or of a block."""
    again_bytes_per_segment: float = 0.0
    """Of what it keeps so beside that, however short a segment is."""
    again_block_frames: int | None = None
    """Frames of the blocks that it keeps whole, also at the end of a segment; None: it keeps
    complete chunks."""


StateT = TypeVar("StateT", bound=TTTState)


class TTTLayer(Streamed, StreamingModule[StateT]):
    """The base class of the layers that learn at test time.

    A method gives `__init__`, `reset_parameters`, `forward` and `_init_streaming_state`; all else
    has a default. Its parameters are bare `nn.Parameter`s, for `moshi` wraps every `nn.Linear` in
    LoRA, and start so that the model computes what it does without TTT, yet has a gradient.
    Training, streaming and any split of a sequence into calls must compute the same: the list of
    tests in tests/ttt/test_model.py says what that means, and runs for every method.

    Args:
        place: the transformer layer that gets it; the model puts it there.
        args: the TTT configuration.
    """

    reads_open_chunk: ClassVar[bool] = True
    """Whether a frame reads what the frames before it in its own chunk are to write: whether there
    is any learning in a sequence without a single update."""

    may_keep: bool = False
    """Whether its operator may keep what it has made where the layer is made again. If it does not
    keep its result, what the layer returns must be nothing but a sum with that."""

    def __init__(self, place: Place, args: TTTArgs):
        super().__init__()
        self.args, self.width = args, place.width
        self.active = True
        """Whether it reads and writes its fast weights; see `ttt.without_ttt`. A layer after
        attention is not called if not; one in place of the MLP is, and is that MLP."""
        self.execution = Execution()
        """How pieces of a parallel forward pass are compiled and checkpointed."""
        self.measure = False
        """Whether parallel forward passes fill `measured`; see `ttt.measuring`."""
        self.measured: dict[str, Tensor] = {}
        """Scalars by name, always with `effect`, ‖what TTT adds‖ / ‖what it is added to‖; none at
        all where no frame could read what was learned."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set its own bare parameters to the start of training."""

    @abstractmethod
    def forward(
        self, x: Tensor, token_embeddings: Tensor | None, is_frame: Tensor | None
    ) -> Tensor:
        """Compute T frames: of whole sequences, or with a `_streaming_state` the next ones; what
        TTT adds to these goes through `streamed`.

        Args:
            x: [B, T, d], the residual stream after attention; in place of the MLP, the MLP's
                normalized input.
            token_embeddings: [B, T, d], see `TTTLMModel.forward_text`.
            is_frame: [B, T], false past the end of a recording; None: all are frames.

        Returns:
            [B, T, d], to be added to the residual stream.
        """

    def ttt_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the method has added to the model's parameters, by name in this module."""
        return dict(self.named_parameters())

    @without_autocast
    def measure_once(self, find: Callable[[], dict[str, Tensor]]) -> None:
        """Fill `measured` with what `find` returns, if it is asked for and was not found yet."""
        if not self.measure:
            return
        # Nothing is saved for a backward pass: checkpointing compares what is with the next.
        with torch.no_grad():
            self.measured = find()
        # Once: activation checkpointing and micro-batches come here again.
        self.measure = not self.measured

    def state_bytes(self, batch_size: int) -> int:
        """Return the bytes of the streaming state of `batch_size` streams; one stream's is made
        for it, and thrown away."""
        tensors = self._init_streaming_state(1).tensors().values()
        return batch_size * sum(tensor.nbytes for tensor in tensors)

    def start_weights(self) -> list[Tensor]:
        assert not self.is_change, "the weights that are changed are the method's to name"
        return [weight[0] for weight in self._init_streaming_state(1).fast_weights()]

    def kept_linears(self) -> set[nn.Module]:
        """Return linear layers that must keep the type of the parameters when the base of the
        model is frozen in fewer bits."""
        return set()

    def write_gates(self) -> list[nn.Parameter]:
        """Return parameters that, set to zero, let nothing be written; none: there are no such."""
        return []

    @classmethod
    def cost(cls, args: TTTArgs) -> Cost | None:
        """Return what it costs in training; None: that was not measured."""
        return None

    @classmethod
    def how_to_strengthen(cls, args: TTTArgs) -> str:
        """Return what raises its effect, beside `optim.ttt_lr`: "raise ttt.base_lr", or nothing."""
        return ""

    @classmethod
    def how_to_weaken(cls, args: TTTArgs) -> str:
        """Return what lowers its effect, beside `optim.ttt_lr`, or nothing."""
        return ""

    def describe(self) -> str:
        """Return the method in a few words."""
        return self.args.method.replace("_", "-")

    def remarks(self) -> Iterator[str]:
        """Yield what is to be said of the configuration when a model is built."""
        yield from ()

    def cautions(self) -> Iterator[str]:
        """Yield what makes this layer slow on a GPU."""
        yield from ()


def layer_class(method: str) -> type[TTTLayer]:
    """Return the class of a registered method's layers.

    Raises:
        ValueError: the registry's line of the method leads to no such class.
    """
    place, _, name = METHODS[method].layer.partition(":")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        # What the module itself imports is not the registry's mistake.
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise ValueError(_explain_line(method, f"there is no module {error.name}")) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, TTTLayer)):
        raise ValueError(_explain_line(method, f"{place} has no TTTLayer called {name!r}"))
    return found


def _explain_line(method: str, why: str) -> str:
    return (
        f"ttt.method: {method} cannot be built: its line in ttt/registry.py says "
        f"{METHODS[method].layer!r}, and {why}; correct that line (module:Class)."
    )
