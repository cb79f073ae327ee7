"""The training benchmarks run stock and ours, from the same weights, on the same codes."""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from target_losses import target_losses
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import OneCycleLR

from finetune.config import LoraArgs, OptimArgs
from finetune.distributed import Sharding, World
from finetune.model import add_lora, freeze_base, parameters_by_role, trainable_by_role
from finetune.step import LossWeights, Optimizer, accumulate_gradients, total_weight
from ttt import TTTArgs, TTTLMModel, build_model
from ttt.ops.frozen import reference

TINY = {
    **loaders._lm_kwargs,
    **{"dim": 64, "num_heads": 4, "num_layers": 3, "text_card": 64, "card": 32, "context": 100},
    **{"depformer_dim": 32, "depformer_num_heads": 4, "depformer_num_layers": 2},
    "depformer_dim_feedforward": 132,
}
TTT: dict[str, dict[str, Any]] = {
    "in_place sum": {"method": "in_place", "write": "sum", "lr_scale": "none", "target": "text"},
    "in_place delta": {"method": "in_place", "write": "delta", "target": "text"},
    "in_place hidden": {"method": "in_place", "write": "delta", "target": "hidden"},
    "linear": {"method": "linear"},
    "mlp": {"method": "mlp"},
}
WEIGHTS = LossWeights(text_padding=0.5, first_codebook=1.0)
MAX_NORM = 1.0


@dataclass(frozen=True)
class Arm:
    """A line of the table."""

    name: str
    is_stock: bool = False
    is_full: bool = False
    """All weights train, of a model with fewer layers; else LoRA."""
    ttt: str | None = None
    checkpointing: Any = True
    selective_layers: int = 0
    compile: bool = True
    batch: int | None = None
    """None: as the options say."""
    base: str = "bfloat16"
    """`base_precision` of the frozen weights; the stock model computes with such weights in the
    plainest way."""


# The two training steps ---------------------------------------------------------------------------


class StockRun:
    """The stock model in a plain loop."""

    def __init__(self, model: LMModel, options: argparse.Namespace):
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float() for p in self.trained]
        optim = OptimArgs(lr=options.lr)
        self.adamw = torch.optim.AdamW(
            self.masters, lr=optim.lr, betas=(0.9, 0.95), weight_decay=optim.weight_decay
        )
        self.schedule = OneCycleLR(
            self.adamw,
            optim.lr,
            total_steps=options.schedule_steps,
            # As ours has it: a rise of a single step divides by zero otherwise.
            pct_start=optim.pct_start * (1 + 1e-9),
        )

    def step(self, codes: Tensor) -> float:
        loss = self.backward(codes)
        for parameter, master in zip(self.trained, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_NORM)
        self.adamw.step()
        self.schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self.trained, self.masters, strict=True):
                parameter.copy_(master)
        return loss.item()

    def target_losses(self, codes: Tensor) -> Tensor:
        """Return the losses of single targets, as `target_losses` does."""
        return target_losses(self.model, codes)

    def backward(self, codes: Tensor) -> Tensor:
        """Adds to the gradients; the loss."""
        loss = sum(total / weight for total, weight in self.sums(codes))
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss.detach()

    def sums(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Σ w · CE and Σ w, of the text and of the audio."""
        model = self.model
        output = model(codes)
        text, audio = codes[:, :1], codes[:, 1 : 1 + model.dep_q]
        is_padding = (text == model.text_padding_token_id) | (text == model.end_of_text_padding_id)
        weight = torch.where(is_padding, WEIGHTS.text_padding, 1.0)
        return [
            _plain_sums(output.text_logits, text, output.text_mask, weight),
            _plain_sums(output.logits, audio, output.mask, torch.ones_like(audio).float()),
        ]


class OtherStockRun(StockRun):
    """The stock run with what the mathematics leaves open done otherwise: row by row, and attention
    by PyTorch's plain form. Only rounding differs."""

    by_row = True
    plain_attention = True

    def target_losses(self, codes: Tensor) -> Tensor:
        """Return the losses of single targets, computed in this way."""
        with self._attention():
            return torch.cat([super(OtherStockRun, self).target_losses(r) for r in self._of(codes)])

    def backward(self, codes: Tensor) -> Tensor:
        weights = total_weight(self.model, [codes], WEIGHTS)
        loss = torch.zeros((), device=codes.device)
        with self._attention():
            for rows in self._of(codes):
                totals = [total for total, _ in self.sums(rows)]
                part = sum(total / w for total, w in zip(totals, weights, strict=True))
                assert isinstance(part, Tensor)
                part.backward()
                loss += part.detach()
        return loss

    def _attention(self) -> AbstractContextManager[None]:
        return sdpa_kernel(SDPBackend.MATH) if self.plain_attention else nullcontext()

    def _of(self, codes: Tensor) -> Sequence[Tensor]:
        return codes.split(1 if self.by_row else len(codes))


class RowByRowStockRun(OtherStockRun):
    """The stock run, row by row."""

    plain_attention = False


class PlainAttentionStockRun(OtherStockRun):
    """The stock run with attention by PyTorch's plain form."""

    by_row = False


def _plain_sums(
    logits: Tensor, targets: Tensor, mask: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    targets = torch.where(mask, targets, 0).flatten()
    nll = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets, reduction="none")
    weight = weight * mask
    return (torch.where(mask.flatten(), nll, 0.0) * weight.flatten()).sum(), weight.sum()


class OurRun:
    """Our run does what `finetune.trainer` does in a step."""

    def __init__(
        self,
        model: TTTLMModel,
        options: argparse.Namespace,
        world: World | None = None,
        sharding: Sharding | None = None,
        optim: OptimArgs | None = None,
    ):
        self.model = model.train()
        self.world = world or World(0, 1, torch.device(options.device))
        self.optimizer = Optimizer(
            trainable_by_role(model),
            optim or OptimArgs(lr=options.lr),
            max_steps=options.schedule_steps,
            sharding=sharding,
        )

    def target_losses(self, codes: Tensor) -> Tensor:
        """Return the losses of single targets, as `target_losses` does."""
        return target_losses(self.model, codes)

    def step(self, *batches: Tensor) -> float:
        """The loss over all batches of all processes."""
        losses = accumulate_gradients(self.model, batches, WEIGHTS, self.world)
        self.optimizer.step(max_norm=MAX_NORM, world=self.world, is_loss_finite=True)
        return sum(losses)


# Models on the device -----------------------------------------------------------------------------


def lm_kwargs(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    kwargs = dict(TINY if options.model == "tiny" else loaders._lm_kwargs)
    if arm.is_full:
        kwargs["num_layers"] = min(kwargs["num_layers"], options.full_layers)
    return kwargs


class Weights:
    """Weights are the same for all arms of a kind: random, drawn on the device from one seed. LoRA
    starts with zeros on one side, as in `moshi-finetune`."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.kind: bool | None = None
        self.base: dict[str, Tensor] = {}

    def stock(self, arm: Arm) -> LMModel:
        options = self.options
        torch.manual_seed(0)
        with torch.device(options.device):
            model = LMModel(
                device=options.device,
                dtype=options.dtype,
                gradient_checkpointing=arm.checkpointing is not False,
                **lm_kwargs(arm, options),
            )
        if self.kind != arm.is_full:
            self.base = {}
            base = model.state_dict()
            # Full fine-tuning changes them.
            self.base = {k: w.clone() for k, w in base.items()} if arm.is_full else base
            self.kind = arm.is_full
            if options.varied_rows:
                vary_rows(self.base, lm_kwargs(arm, options)["num_layers"] // 2)
        model.load_state_dict(self.base, assign=not arm.is_full)
        if not arm.is_full:
            model.requires_grad_(False)
            torch.manual_seed(1)
            replace_all_linear_with_lora(model, options.rank, 2.0)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
            self._start(model)
            if arm.base != "bfloat16":
                round_base(model, arm.base, kept=self._kept(arm))
        return model

    def ours(self, arm: Arm) -> TTTLMModel:
        options = self.options
        if self.kind != arm.is_full:
            self.stock(replace(arm, base="bfloat16"))
        args = self._ttt_args(arm)
        with torch.device(options.device):
            model = build_model(
                lm_kwargs(arm, options),
                args,
                device=options.device,
                dtype=options.dtype,
                gradient_checkpointing=arm.checkpointing,
                selective_layers=arm.selective_layers,
                compile=arm.compile,
            )
        model.load_state_dict(self.base, strict=False, assign=not arm.is_full)
        if not arm.is_full:
            add_lora(model, LoraArgs(enable=True, rank=options.rank), seed=1)
            self._start(model)
            freeze_base(model, arm.base)
            if arm.base != "bfloat16" and options.frees_base:
                # Beside it, the weights in full would be most of the peak.
                self.base, self.kind = {}, None
        trained = {"base", "embedding"} if arm.is_full else {"lora"}
        for role, named in parameters_by_role(model).items():
            for parameter in named.values():
                parameter.requires_grad_(role in trained | {"ttt"})
        return model

    def _ttt_args(self, arm: Arm) -> TTTArgs:
        chosen: dict[str, Any] = TTT[arm.ttt] if arm.ttt else {"enabled": False}
        return TTTArgs(**{"enabled": True, **self.options.ttt_layers, **chosen})

    def _kept(self, arm: Arm) -> set[str]:
        """Names of what stays in full in the main transformer: W0 of In-Place TTT."""
        args = self._ttt_args(arm)
        if not args.enabled or args.method != "in_place":
            return set()
        layers = args.layers(lm_kwargs(arm, self.options)["num_layers"])
        return {f"layers.{index}.gating.linear_out" for index in layers}

    @staticmethod
    @torch.no_grad()
    def _start(model: nn.Module) -> None:
        """The adapters by name, whatever else is in the model."""
        for number, (_, module) in enumerate(
            sorted((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))
        ):
            generator = torch.Generator(module.lora_A.weight.device).manual_seed(number)
            bound = module.in_features**-0.5
            module.lora_A.weight.uniform_(-bound, bound, generator=generator)
            module.lora_B.weight.zero_()


@torch.no_grad()
def vary_rows(base: dict[str, Tensor], layer: int) -> None:
    """Give the rows of a layer's weights sizes from a half to twice what they have."""
    for name, weight in base.items():
        if name.startswith(f"transformer.layers.{layer}.") and weight.dim() == 2:
            factors = 2 ** torch.linspace(-1, 1, len(weight), device=weight.device)
            weight.mul_(factors[:, None].to(weight.dtype))


class PlainlyFrozen(nn.Module):
    """A frozen layer as `ttt.ops.frozen.reference` defines it, without any of its kernels."""

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.kind, weight = kind, linear.weight.detach()
        if kind == "nf4":
            rows = max(1, CHUNK_WEIGHTS // weight.shape[1] // 64 * 64)
            parts = [
                reference.nf4_dequantize(*reference.nf4_quantize(w)) for w in weight.split(rows)
            ]
            self.weight = torch.cat(parts).to(weight.dtype)
        else:
            self.values, scales = reference.to_e4m3(weight)
            self.scales = scales.flatten()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nf4":
            return F.linear(x, self.weight)
        out: Tensor = _PlainProduct.apply(x.flatten(0, -2), self.values, self.scales)
        return out.unflatten(0, x.shape[:-1])


CHUNK_WEIGHTS = 2**22
"""Weights that the reference rounds at once: it compares each with sixteen numbers."""


class _PlainProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(values, scales)
        return reference.float8_product(x, values, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reference.float8_gradient(grads[0], *ctx.saved_tensors), None, None


def round_base(model: LMModel, kind: str, *, kept: set[str]) -> None:
    """Let the stock model compute with the weights of its transformers as they are kept in fewer
    bits; but for those of the main one in `kept`."""
    for transformer in (model.transformer, model.depformer):
        assert transformer is not None
        for name, module in transformer.named_modules():
            stays = transformer is model.transformer and name in kept
            if isinstance(module, LoRALinear) and not stays:
                # Another layer has the place in which `moshi` would look for a weight.
                module.frozen_W = PlainlyFrozen(module.frozen_W, kind)


def random_codes(batch: int, arm: Arm, options: argparse.Namespace) -> Tensor:
    """[B, 17, T]; three text tokens of four are padding."""
    kwargs = lm_kwargs(arm, options)
    generator = torch.Generator().manual_seed(0)
    shape = batch, kwargs["n_q"] + 1, options.frames
    codes = torch.randint(0, kwargs["card"], shape, generator=generator)
    text = torch.randint(0, kwargs["text_card"], (batch, options.frames), generator=generator)
    is_padding = torch.rand(batch, options.frames, generator=generator) < 0.75
    codes[:, 0] = torch.where(is_padding, 3, text)
    return codes.to(options.device)
