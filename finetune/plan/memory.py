"""The GPU memory of a training step is computed without making any of it.

The peak lies in the backward pass, at the largest of three stages. In the depth transformer's all
that was kept is still there; when the main transformer's last layers follow, what the depth
transformer and the loss had kept is gone, and it is there that TTT works; at its first layers
nothing else is kept, but all gradients have come. What is counted, for one process:

    weights      in `param_dtype`; parameters that train also, or only (if sharded), in float32;
                 what `base_precision` keeps in fewer bits, in these, whole in every process
    gradients    float32, of what trains and has its gradient by then: all of it, from the second
                 micro-batch on
    optimizer    two moments, in `optim.state`
    gathered     of a sharded model: all that is in no layer, and two layers, whole
    kept         the inputs of all layers that a gradient passes through (activation checkpointing),
                 the results of products where these are kept, and what the loss starts from
    working      the largest layer's intermediate results, and their gradients; less where no
                 layer's weights train
    TTT          what its operator takes beside that, if the main transformer's stage is the larger

Results of products are counted at their full width; what is done element by element between them
(norms, activations, rotations) half as much again. The depth transformer works on a chunk of frames
at a time. What was measured to check this is in docs/distributed.md and docs/benchmarks.md.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import nn

from finetune.config import TrainArgs
from finetune.data import count_frames
from finetune.distributed import FEW, peak_memory_gb, shard_size
from finetune.errors import UserError
from finetune.step import moment_bytes
from ttt import TTTLMModel
from ttt.layers import layer_class
from ttt.layers.depth import CHUNK_FRAMES
from ttt.layers.frozen import FrozenLinear, frozen_bytes, frozen_linears, num_frozen

ELEMENTWISE = 1.5
"""What is kept of a layer that is not computed again, relative to its products."""
WORKING = 2.9
"""What a layer takes while its backward pass runs, relative to its products: some 10 GB for the
depth transformer's and 20,000 frames of Moshi 7B, whose products have 3.4 GB."""
WORKING_FROZEN = 1.7
"""The same of layers none of whose weights trains: what their products read is not kept. From steps
of Moshi 7B that train TTT alone, in three precisions; see docs/benchmarks.md."""
RESERVED_BYTES = 1.5e9
"""CUDA's and NCCL's own."""
FRAGMENTATION = 0.03
"""Of what a GPU has: lost between blocks."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, of one GPU. What comes and goes (gradients, kept, working, ttt) is as at
    the stage where the sum is largest."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    kept: float
    working: float
    ttt: float

    @property
    def peak(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def fits(memory: Memory, gpu_bytes: float) -> bool:
    return memory.peak <= gpu_bytes * (1 - FRAGMENTATION) - RESERVED_BYTES


def smallest_gpu_gb(memory: Memory) -> int:
    """Return how many whole GB a GPU must have so that this fits."""
    return math.ceil((memory.peak + RESERVED_BYTES) / (1 - FRAGMENTATION) / 1e9)


def estimate(args: TrainArgs, model: TTTLMModel, num_gpus: int) -> Memory:
    """
    Args:
        model: as `plan_model` makes it, on `meta`.

    Raises:
        UserError: the GPUs cannot be divided as `parallel.shard_size` says.
    """
    size = shard_size(args, num_gpus)
    width = getattr(torch, args.param_dtype).itemsize
    parameters = list(model.parameters())
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    num_wide = sum(p.numel() for p in parameters) - num_trained
    in_fewer_bits = num_frozen(model)
    if size > 1:
        weights = (num_wide * width + 4 * num_trained) / size + frozen_bytes(model)
        gathered = _gathered(model, width)
        gradients = 4 * num_trained / size
        is_few = num_trained < FEW * (num_wide + num_trained + in_fewer_bits)
        whole_gradients = 4 * num_trained if args.num_microbatches > 1 and is_few else 0
    else:
        whole_gradients = 0
        masters = 4 * num_trained if width < 4 else 0
        weights = num_wide * width + num_trained * width + masters + frozen_bytes(model)
        gathered, gradients = 0.0, 4 * num_trained
    num_frames = args.batch_size * count_frames(args.duration_sec)
    stages = _stages(args, model, num_frames, width)
    in_main = _count(model.transformer, trained=True) / num_trained if num_trained else 0.0
    present = 1.0 if args.num_microbatches > 1 else 1.0 - in_main
    early = [(gradients * present + whole_gradients, *stage) for stage in stages]
    # In the first layers what was kept for the others is gone.
    late = [(gradients + whole_gradients, 0.0, *stage[1:]) for stage in stages[1:]]
    at_peak, kept, working, ttt = max(early + late, key=sum)
    moments = sum(moment_bytes(p.numel(), args.optim.state) for p in parameters if p.requires_grad)
    return Memory(weights, at_peak, moments / size, gathered, kept, working, ttt)


def _gathered(model: TTTLMModel, width: int) -> float:
    """Whole weights of a sharded model at one time, and the whole gradients that they get."""
    layers = [*model.transformer.layers, *model.depformer.layers]
    largest = max(layers, key=_count)
    rest = _count(model) - sum(map(_count, layers))
    rest_trained = _count(model, trained=True) - sum(
        _count(layer, trained=True) for layer in layers
    )
    held = width * (rest + 2 * _count(largest))
    # A layer's gradients in the type of its weights, and in float32 while they are summed.
    return held + width * rest_trained + (width + 4) * _count(largest, trained=True)


def _stages(
    args: TrainArgs, model: TTTLMModel, num_frames: int, width: int
) -> list[tuple[float, float, float]]:
    """Return what is kept, what works, and TTT's own: in the backward pass of the depth
    transformer, and of each kind of the main transformer's blocks."""
    main, depth = model.transformer.layers, model.depformer.layers
    depth_rows = num_frames * model.dep_q
    depth_dim = model.depformer_text_emb.embedding_dim
    per_main = num_frames * _products(main[0])
    depth_products = max(_products(layer) for layer in depth)
    share = 1.0 if args.gradient_checkpointing else ELEMENTWISE
    # Inputs of the layers; embeddings and the main transformer's output with its gradient; the
    # heads' inputs with theirs.
    passed = _num_passed(model)
    kept_main = width * (passed + 3) * num_frames * model.dim
    keeping = keeping_layers(args, model)
    kept_main += width * share * per_main * len(keeping)
    cost = layer_class(args.ttt.method).cost(args.ttt) if args.ttt.enabled else None
    ttt_frames = num_frames * model.dim / 4096
    if cost is not None:
        own_layers = set(model.ttt_layers)
        # Beside an MLP, and not in its place, TTT ends what is made again at once: the MLP's input
        # is kept as well.
        beside = [index for index in own_layers - keeping if main[index].ttt is not None]
        kept_main += width * num_frames * model.dim * len(beside)
        kept_main += cost.kept_bytes_per_frame * ttt_frames * len(keeping & own_layers)
        if args.gradient_checkpointing is True:
            length, size = count_frames(args.duration_sec), args.ttt.update_frames
            if (block := cost.again_block_frames) is not None:
                written = math.ceil(length / block) * block
            else:
                written = length // size * size
            again = cost.again_bytes_per_frame * written + cost.again_bytes_per_segment
            kept_main += again * ttt_frames / length * len(own_layers - keeping)
    share = 0.0 if args.gradient_checkpointing is True else share
    kept_depth = width * (
        (len(depth) + 3) * depth_rows * depth_dim + share * len(depth) * num_frames * depth_products
    )
    in_full = _in_full(model, width)
    depth_frames = min(num_frames, CHUNK_FRAMES)
    working_depth = in_full + width * _working(depth) * depth_frames * depth_products
    working_main = in_full + width * _working(main) * per_main
    stages = [(kept_main + kept_depth, working_depth, 0.0), (kept_main, working_main, 0.0)]
    if cost is not None:
        own = cost.bytes_per_frame * ttt_frames
        own += cost.bytes_per_segment * args.batch_size * model.dim / 4096
        stages.append((kept_main, working_main, own))
    return stages


def keeping_layers(args: TrainArgs, model: TTTLMModel) -> set[int]:
    """Return the main transformer's layers that keep the results of their products: of those that
    a gradient passes through, as the others keep nothing."""
    num_layers = len(model.transformer.layers)
    chosen = model.order_of_keeping
    if args.gradient_checkpointing is True:
        chosen = chosen[: args.selective_layers]
    return {index for index in chosen if index >= num_layers - _num_passed(model)}


def _num_passed(model: TTTLMModel) -> int:
    """Return how many of the main transformer's layers a gradient passes through: those from the
    first on that has anything to train, or all, where embeddings train."""
    main = list(model.transformer.layers)
    embeddings = [model.text_emb, *model.emb]
    if any(_count(embedding, trained=True) for embedding in embeddings):
        return len(main)
    first = (index for index, layer in enumerate(main) if _count(layer, trained=True))
    return len(main) - next(first, len(main))


def _working(layers: nn.ModuleList) -> float:
    """Return what the largest of the layers takes while its backward pass runs, relative to its
    products."""
    return WORKING if any(_count(layer, trained=True) for layer in layers) else WORKING_FROZEN


def _in_full(model: TTTLMModel, width: int) -> float:
    """Bytes of the largest frozen weight where it is used: as the products read it, or turned."""
    sizes = [
        each.in_features * each.out_features * (width if each.kind == "nf4" else 1)
        for _, each in frozen_linears(model)
    ]
    return max(sizes, default=0)


def _products(layer: nn.Module) -> int:
    """Numbers that the linear layers in a layer put out for a frame. LoRA's are added to those of
    the frozen layer, and not kept."""
    return sum(
        module.out_features
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | FrozenLinear) and not name.endswith("lora_B")
    )


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@contextmanager
def explained(args: TrainArgs, device: torch.device, what: str, *, trains: bool) -> Iterator[None]:
    """Running out of memory in here becomes a message.

    Args:
        what: is done, "step 3" and the like.
        trains: with gradients, and what is kept for them.

    Raises:
        UserError: it has happened.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_explain_out_of_memory(args, device, what, trains)) from error


def _explain_out_of_memory(args: TrainArgs, device: torch.device, what: str, trains: bool) -> str:
    """Return what to do when something does not fit."""
    ways = []
    if args.batch_size > 1:
        ways.append(
            f"a smaller batch_size (now {args.batch_size}) with as many times more "
            f"num_microbatches (now {args.num_microbatches}), which trains the same"
        )
    if trains:
        less = {True: [], "selective": ["true"], False: ["selective", "true"]}
        ways += [f"gradient_checkpointing: {value}" for value in less[args.gradient_checkpointing]]
        if args.selective_layers:
            ways.append(f"fewer selective_layers (now {args.selective_layers})")
        if args.gradient_checkpointing is True and args.ttt.keeps_writes:
            ways.append("ttt.keep_writes: false")
    ways.append("a shorter duration_sec")
    if not trains:
        ways.append("do_eval: false, which leaves evaluations out")
    return (
        f"{device} ran out of memory in {what} ({peak_memory_gb(device):.1f} GB were in use "
        f"at most). Less memory takes: {'; '.join(ways)}. `moshi-ttt plan` estimates what "
        f"{'fits' if trains else 'a training step takes'}. Checkpoints that were saved before are "
        f"whole."
    )
