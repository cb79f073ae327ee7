"""AdamW whose moments take fewer bits between two steps: `optim.state`.

The step itself is PyTorch's, in float32, of some parameters at a time: so their moments alone are
there in full, and few kernels are started. `int8` is the format of bitsandbytes' 8-bit Adam
(Dettmers et al. 2022): 256 numbers of very different size, times the largest absolute value of each
256 moments. Its own optimizer computes on a GPU alone; its functions of the format do on a CPU as
well.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for every parameter, besides the number of its steps."""
BLOCK = 256
"""Moments of `int8` that share a scale."""
LEAST = 4096
"""Parameters of fewer numbers keep their moments in float32, as bitsandbytes has it: norms, gates
and the like, which are sensitive and cost nothing."""
AT_ONCE = 2**24
"""Numbers that are stepped together: 128 MB of moments."""


def new_moments(master: Tensor, kind: str, *, numel: int) -> dict[str, Tensor]:
    """Return moments of zero, as they are kept between two steps, by name.

    Args:
        master: what is stepped; of a sharded parameter, this process's part.
        numel: the whole parameter's numbers, by which all processes keep the same type.
    """
    if kind == "float32" or numel < LEAST:
        return {name: torch.zeros_like(master) for name in MOMENTS}
    if kind == "bfloat16":
        return {name: torch.zeros_like(master, dtype=torch.bfloat16) for name in MOMENTS}
    found: dict[str, Tensor] = {}
    for name in MOMENTS:
        codes, scales = _quantize(torch.zeros_like(master), name)
        found |= {name: codes, f"{name}_scales": scales}
    return found


def moment_bytes(numel: int, kind: str) -> float:
    """Bytes of both moments of a parameter."""
    if kind == "float32" or numel < LEAST:
        return 8.0 * numel
    return 4.0 * numel if kind == "bfloat16" else 2.0 * (numel + 4 * -(-numel // BLOCK))


class CompactAdamW(torch.optim.AdamW):
    """
    Args:
        groups: as for AdamW; "numels" are the numbers of whole parameters, as for `new_moments`.
        kind: "bfloat16" or "int8".
        options: of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, kind: str, **options: Any):
        super().__init__(groups, **options)
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            ready = [
                (parameter, numel)
                for parameter, numel in zip(group["params"], group["numels"], strict=True)
                if parameter.grad is not None
            ]
            for parameter, numel in ready:
                if not self.state[parameter]:
                    device = parameter.device if group["fused"] else "cpu"
                    step = torch.zeros((), device=device)
                    moments = new_moments(parameter, self.kind, numel=numel)
                    self.state[parameter] = {"step": step, **moments}
            for parameters in _batches(ready):
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        moments = [_in_full(states, name) for name in MOMENTS]
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            moments[0].of_parameters,
            moments[1].of_parameters,
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in zip(MOMENTS, moments, strict=True):
            _keep(states, name, moment)


class _Full(NamedTuple):
    """A moment of parameters that are stepped together, in float32."""

    flat: Tensor | None
    """One parameter after the other, each up to the end of its last block, with zeros; None: it is
    kept in float32, and stepped where it is."""
    of_parameters: list[Tensor]
    """Each parameter's, in its shape."""


def _batches(parameters: Sequence[tuple[Tensor, int]]) -> Iterator[list[Tensor]]:
    """Yield the parameters that are stepped together: all with at least LEAST numbers or all with
    fewer, and of no more than AT_ONCE numbers where it is not one alone.

    Args:
        parameters: with the numbers of each whole parameter.
    """
    for is_small in (True, False):
        batch: list[Tensor] = []
        count = 0
        for parameter, numel in parameters:
            number = parameter.numel()
            if (numel < LEAST) != is_small:
                continue
            if batch and count + number > AT_ONCE:
                yield batch
                batch, count = [], 0
            batch.append(parameter)
            count += number
        if batch:
            yield batch


def _in_full(states: list[dict[str, Tensor]], name: str) -> _Full:
    kept = [state[name] for state in states]
    if kept[0].dtype == torch.float32:
        return _Full(None, kept)
    lengths = [-(-moment.numel() // BLOCK) * BLOCK for moment in kept]
    has_scales = f"{name}_scales" in states[0]
    if has_scales:
        codes = [F.pad(x.flatten(), (0, n - x.numel())) for x, n in zip(kept, lengths, strict=True)]
        scales = torch.cat([state[f"{name}_scales"] for state in states])
        flat: Tensor = _operators().dequantize_blockwise(
            torch.cat(codes), scales, _numbers(name, scales.device), BLOCK, torch.float32
        )
    else:
        flat = torch.empty(sum(lengths), device=kept[0].device)
    full = []
    for part, moment in zip(flat.split(lengths), kept, strict=True):
        number = moment.numel()
        if number < len(part):
            part[number:] = 0
        full.append(part[:number].view(moment.shape))
    if not has_scales:
        torch._foreach_copy_(full, kept)
    return _Full(flat, full)


def _keep(states: list[dict[str, Tensor]], name: str, moment: _Full) -> None:
    if moment.flat is None:
        return
    kept = [state[name] for state in states]
    if f"{name}_scales" not in states[0]:
        torch._foreach_copy_(kept, moment.of_parameters)
        return
    codes, scales = _quantize(moment.flat, name)
    all_scales = [state[f"{name}_scales"] for state in states]
    parts = codes.split([BLOCK * len(each) for each in all_scales])
    torch._foreach_copy_(
        kept, [part[: x.numel()].view(x.shape) for part, x in zip(parts, kept, strict=True)]
    )
    torch._foreach_copy_(all_scales, list(scales.split([len(each) for each in all_scales])))


def _quantize(moment: Tensor, name: str) -> tuple[Tensor, Tensor]:
    numbers = _numbers(name, moment.device)
    found: tuple[Tensor, Tensor] = _operators().quantize_blockwise(
        moment.contiguous(), numbers, BLOCK
    )
    return found


@cache
def _numbers(name: str, device: torch.device) -> Tensor:
    """Return the 256 numbers of a moment; the second one is never negative."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").to(device)


@cache
def _operators() -> Any:
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes
