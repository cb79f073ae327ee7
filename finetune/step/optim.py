"""AdamW on float32 master weights, with a learning rate by role and a one-cycle schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import OneCycleLR

from finetune.config import OptimArgs
from finetune.distributed import Sharding, World, local
from finetune.step.compact_adamw import CompactAdamW, new_moments


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step: gradient norms before clipping, over all and by role;
    learning rates by name (`lr`, and `ttt_lr` if TTT trains)."""

    grad_norm: float
    grad_norm_by_role: dict[str, float]
    learning_rates: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm)


class Optimizer:
    """Optimizer and schedule of the trainable parameters.

    Parameters below float32 have a float32 master copy that the optimizer steps, and that gradients
    are summed into: a step of 1e-5 would be lost in a bfloat16 weight, and so would the small
    gradients of a late micro-batch. Of sharded parameters, which are float32, each process steps
    its own part.

    Args:
        parameters: by role ("base", "embedding", "lora", "ttt") and then by name; only these train.
        args: learning rates and so on. TTT parameters have their own learning rate, and no weight
            decay: it would pull their projection from the identity to zero.
        max_steps: length of the schedule.
        sharding: how the parameters are sharded; None: every process has all of them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Mapping[str, nn.Parameter]],
        args: OptimArgs,
        *,
        max_steps: int,
        sharding: Sharding | None = None,
    ):
        self.sharding = sharding
        self.names = {role: list(named) for role, named in parameters.items()}
        self.parameters = {role: list(named.values()) for role, named in parameters.items()}
        self.masters = {
            role: [_with_master(p) for p in params] for role, params in self.parameters.items()
        }
        groups: list[dict[str, Any]] = [
            {
                "params": masters,
                "numels": [p.numel() for p in self.parameters[role]],
                "lr": args.ttt_lr if role == "ttt" else args.lr,
                "weight_decay": 0.0 if role == "ttt" else args.weight_decay,
                "role": role,
            }
            for role, masters in self.masters.items()
        ]
        on_gpu = next(iter(self._all_masters())).is_cuda
        options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": on_gpu}
        self.kind = args.state
        self.adamw = (
            torch.optim.AdamW(groups, **options)
            if self.kind == "float32"
            else CompactAdamW(groups, kind=self.kind, **options)
        )
        # OneCycleLR also lowers beta1 from 0.95 while the learning rate is high: so it is in
        # moshi-finetune, and runs without TTT should compare with its.
        self.schedule = OneCycleLR(
            self.adamw,
            max_lr=[group["lr"] for group in groups],
            total_steps=max_steps,
            # It divides by the rise's steps less one: where that is 0, make it hardly more.
            pct_start=args.pct_start * (1 + 1e-9),
        )

    def step(self, *, max_norm: float, world: World, is_loss_finite: bool) -> StepResult:
        """Take a step with the gradients there are, and clear them.

        A loss or gradient that is not finite changes nothing but the schedule.
        """
        if self.sharding is None:
            world.sum_all_over_data(m.grad for m in self._all_masters() if m.grad is not None)
        else:
            self._take_own_gradients()
        norms = self._norms()
        total = get_total_norm(list(norms.values()))
        all_norms: list[float] = torch.stack([total, *norms.values()]).tolist()
        result = StepResult(
            all_norms[0],
            dict(zip(norms, all_norms[1:], strict=True)),
            {"ttt_lr" if g["role"] == "ttt" else "lr": g["lr"] for g in self.adamw.param_groups},
        )
        if result.is_finite and is_loss_finite:
            clip_grads_with_norm_(self._all_masters(), max_norm, total)
            self.adamw.step()
            self._write_back()
        self.adamw.zero_grad(set_to_none=True)
        self.schedule.step()
        return result

    def _take_own_gradients(self) -> None:
        """Take the gradients of this process's parts; FSDP has summed them."""
        for parameter, master in self._named().values():
            if parameter.grad is not None:
                master.grad = local(parameter.grad)
                parameter.grad = None

    def _norms(self) -> dict[str, Tensor]:
        """Gradient norms by role, of whole gradients."""
        norms = {
            role: get_total_norm([m.grad for m in masters if m.grad is not None])
            for role, masters in self.masters.items()
            if any(m.grad is not None for m in masters)
        }
        if self.sharding is None:
            return norms
        squares = self.sharding.sum_over_parts(torch.stack(list(norms.values())) ** 2)
        return dict(zip(norms, squares.sqrt(), strict=True))

    def tensors(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        """Return what the optimizer keeps, by name (`exp_avg/transformer.layers.0.norm1.alpha`):
        each tensor with the parameter that it is of. Of a sharded one, this process's part."""
        found = {}
        for name, (parameter, master) in self._named().items():
            found[f"master/{name}"] = (master, parameter)
            for key, kept in self.adamw.state.get(master, {}).items():
                if key != "step":
                    found[f"{key}/{name}"] = (kept, parameter)
        return found

    def summary(self) -> dict[str, Any]:
        """The rest of its state: which parameters these are, and how far they and the schedule are.
        The same for every process."""
        taken = self.adamw.state
        steps = [taken[m]["step"] if m in taken else torch.zeros(()) for m in self._all_masters()]
        counts = torch.stack([step.to(steps[0].device) for step in steps]).tolist()
        roles = {name: role for role, names in self.names.items() for name in names}
        return {
            "parameters": {
                name: {"role": roles[name], "shape": list(parameter.shape), "steps": count}
                for (name, (parameter, _)), count in zip(self._named().items(), counts, strict=True)
            },
            "schedule_step": self.schedule.last_epoch,
            "state": self.kind,
        }

    @torch.no_grad()
    def restore(
        self,
        summary: dict[str, Any],
        fill: Callable[[dict[str, tuple[Tensor, nn.Parameter]]], None],
    ) -> None:
        """Continue from a state.

        The learning rates and so on are those of this configuration, which may have been changed.

        Args:
            summary: see there.
            fill: puts the saved values into `tensors()`.

        Raises:
            ValueError: the state is of other parameters than those that train now, in another type,
                or of a step beyond the schedule.
        """
        own = self.summary()["parameters"]
        saved = summary["parameters"]
        if [(n, p["role"], p["shape"]) for n, p in saved.items()] != [
            (n, p["role"], p["shape"]) for n, p in own.items()
        ]:
            raise ValueError("it holds other trainable parameters than this configuration has")
        kind = summary.get("state", "float32")
        if kind != self.kind:
            raise ValueError(f"it keeps moments in {kind}, and optim.state is {self.kind}")
        step = summary["schedule_step"]
        if step > self.schedule.total_steps:
            raise ValueError(
                f"it was saved after step {step}, and max_steps is {self.schedule.total_steps}"
            )
        fused = self.adamw.defaults["fused"]
        for name, (parameter, master) in self._named().items():
            if count := saved[name]["steps"]:
                self.adamw.state[master] = {
                    "step": torch.tensor(count, device=master.device if fused else "cpu"),
                    **new_moments(master, self.kind, numel=parameter.numel()),
                }
        fill(self.tensors())
        self.schedule.load_state_dict({"last_epoch": step - 1, "_step_count": step})
        self.schedule.step()
        self._write_back()

    def _named(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Every parameter and its master, by name."""
        return {
            name: (parameter, master)
            for role, names in self.names.items()
            for name, parameter, master in zip(
                names, self.parameters[role], self.masters[role], strict=True
            )
        }

    def _all_masters(self) -> list[Tensor]:
        return [master for masters in self.masters.values() for master in masters]

    @torch.no_grad()
    def _write_back(self) -> None:
        own = [p for parameters in self.parameters.values() for p in parameters]
        pairs = [
            (p, m) for p, m in zip(own, self._all_masters(), strict=True) if p.dtype != m.dtype
        ]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def _with_master(parameter: nn.Parameter) -> Tensor:
    """The tensor to optimize for `parameter`: itself, or a float32 copy that gets its gradients."""
    if parameter.dtype == torch.float32:
        return local(parameter)
    master = parameter.detach().float()

    def move_grad(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    parameter.register_post_accumulate_grad_hook(move_grad)
    return master
