"""AdamW whose moments take fewer bits between two steps: `optim.state`.

The step itself is PyTorch's, in float32, one parameter after the other: so the moments of one
parameter alone are there in full. `int8` is the format of bitsandbytes' 8-bit Adam (Dettmers et al.
2022): 256 numbers of very different size, times the largest absolute value of each 256 moments. Its
own optimizer computes on a GPU alone; its functions of the format do on a CPU as well.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for every parameter, besides the number of its steps."""
BLOCK = 256
"""Moments of `int8` that share a scale."""
LEAST = 4096
"""Parameters of fewer numbers keep their moments in float32, as bitsandbytes has it: norms, gates
and the like, which are sensitive and cost nothing."""


def new_moments(master: Tensor, kind: str) -> dict[str, Tensor]:
    """Moments of zero, as they are kept between two steps, by name."""
    if kind == "float32" or master.numel() < LEAST:
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
        groups: as for AdamW.
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            on_device = parameter.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), device=on_device)
            state.update(new_moments(parameter, self.kind))
        moments = [_in_full(state, name) for name in MOMENTS]
        adamw(
            [parameter],
            [parameter.grad],  # type: ignore[list-item]
            [moments[0]],
            [moments[1]],
            [],
            [state["step"]],
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
            _keep(state, name, moment)


def _in_full(state: dict[str, Tensor], name: str) -> Tensor:
    kept = state[name]
    if f"{name}_scales" not in state:
        return kept.float()
    found: Tensor = _operators().dequantize_blockwise(
        kept, state[f"{name}_scales"], _numbers(name, kept.device), BLOCK, torch.float32
    )
    return found


def _keep(state: dict[str, Tensor], name: str, moment: Tensor) -> None:
    if f"{name}_scales" not in state:
        state[name].copy_(moment)
        return
    codes, scales = _quantize(moment, name)
    state[name].copy_(codes)
    state[f"{name}_scales"].copy_(scales)


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
