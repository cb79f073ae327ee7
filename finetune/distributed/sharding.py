"""FSDP2 cuts one model over many processes, layer by layer.

Each process holds a part of every weight, gradient and optimizer state. A layer's weights are
gathered shortly before they are used, in the type that the forward pass computes in, and let go
after; its gradients are summed, in float32, to where the parts are.

Parameters that train are held in float32, and are what the optimizer steps: there is no other
master copy. Frozen ones are held as they are used; those that `base_precision` keeps in fewer bits
are not cut at all: every process has them whole, and nothing is gathered for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from finetune.config import TrainArgs
from finetune.distributed.world import World
from finetune.errors import UserError
from ttt import TTTLMModel
from ttt.layers.frozen import num_frozen

FEW = 0.1
"""Up to this share of all parameters, gradients are kept whole between micro-batches."""


@dataclass(frozen=True)
class Sharding:
    """A sharding cuts a model: every `size` processes share a copy, and there may be several
    copies."""

    mesh: DeviceMesh
    """(replicate, shard); or (shard) alone where there is one copy."""
    host_mesh: DeviceMesh
    """The same processes, for tensors in host memory."""
    dtype: torch.dtype
    """Of the forward pass."""

    @classmethod
    def build(cls, world: World, dtype: torch.dtype) -> "Sharding":
        """Cut along the `shard` dimension of the world's mesh, in each copy alike."""
        assert world.mesh is not None
        host = world.mesh
        if world.device.type != "cpu":
            host = init_device_mesh("cpu", tuple(host.shape), mesh_dim_names=host.mesh_dim_names)
        mesh, host_mesh = (each[world.data_dimensions] for each in (world.mesh, host))
        return cls(mesh, host_mesh, dtype)

    @property
    def size(self) -> int:
        return self.mesh.size(-1)

    def parts(self, model: TTTLMModel) -> Iterator[tuple[str, nn.Module]]:
        """Yield what is gathered at once, by its name in the model; the rest of the model comes
        last."""
        for name in ("transformer", "depformer"):
            transformer = getattr(model, name)
            for index, layer in enumerate(transformer.layers if transformer is not None else ()):
                yield f"{name}.layers.{index}", layer
        yield "", model

    def cut(self, part: nn.Module) -> None:
        """Replace the part's weights by this process's share of them; the whole ones are freed."""
        is_rest = isinstance(part, TTTLMModel)
        fully_shard(
            part,
            mesh=self.mesh,
            # The embeddings are read first and the heads last: letting go of them between would
            # gather them twice, and the loss reads the heads after the forward pass.
            reshard_after_forward=not is_rest,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        )
        assert isinstance(part, FSDPModule)
        # The loss is already divided by the weight of the global batch.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        # FSDP settles where the parts lie in memory when it gathers them first; the optimizer keeps
        # hold of them from now on.
        part.unshard()
        part.reshard()
        if hasattr(part, "whole_sequence"):
            register_fsdp_forward_method(part, "whole_sequence")

    def sum_over_parts(self, tensor: Tensor) -> Tensor:
        """Over the processes that share a copy; also stored in `tensor` itself."""
        dist.all_reduce(tensor, group=self.mesh.get_group("shard"))
        return tensor


def build_sharding(args: TrainArgs, world: World) -> Sharding | None:
    """Return how the model is cut, or None where every process has the whole model."""
    if world.dimension_size("shard") == 1:
        return None
    return Sharding.build(world, getattr(torch, args.param_dtype))


def shard_size(args: TrainArgs, num_processes: int) -> int:
    """Return how many processes share a copy of the model.

    Raises:
        UserError: they cannot be divided so.
    """
    wanted = args.parallel.shard_size
    if wanted == "auto":
        wanted = num_processes if args.full_finetuning else 1
    if wanted > 1 and args.optim.state == "int8":
        raise UserError(
            "optim.state: int8 is for models that are not sharded, as its blocks are those of "
            "whole parameters; choose bfloat16, or parallel.shard_size: 1."
        )
    if num_processes % wanted:
        raise UserError(
            f"parallel.shard_size: {num_processes} processes cannot be divided into groups of "
            f"{wanted}. Choose a divisor of {num_processes}; 1 keeps a whole model in each."
        )
    return wanted


def local(tensor: Tensor) -> Tensor:
    """Return this process's part, in the same memory; the tensor itself where it is not sharded."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(part: Tensor, parameter: Tensor, sharding: Sharding | None) -> Tensor:
    """A process's part of something of the parameter's shape, as one tensor of all processes: on
    the host or on the device, as `part` is."""
    if not isinstance(parameter, DTensor):
        return part
    assert sharding is not None
    is_on_host = part.device.type == "cpu"
    return DTensor.from_local(
        part,
        sharding.host_mesh if is_on_host else sharding.mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return all of a tensor, on every process; all must ask for it."""
    tensor = tensor.detach().to(dtype or tensor.dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_gradients_when_needed(model: nn.Module, *, is_last: bool) -> None:
    """Before a micro-batch's forward and backward passes.

    Few gradients (LoRA, TTT alone) stay whole in each process until the last micro-batch. Many
    would take as much memory as an unsharded model: they are cut each time, and summed over the
    copies at the last.
    """
    if not isinstance(model, FSDPModule):
        return
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    if trained < FEW * (sum(p.numel() for p in parameters) + num_frozen(model)):
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)


def let_go(model: nn.Module) -> None:
    """After forward passes without a backward pass: keep parts alone."""
    if isinstance(model, FSDPModule):
        model.reshard()
