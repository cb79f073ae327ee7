"""A checkpoint as others can load it: weights and names of stock `moshi`, TTT's beside, a card."""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.checkpoint import merged_weights, seal
from finetune.config import Precision, TrainArgs
from finetune.errors import UserError
from finetune.inference import checkpoint_args, find_base, load_for_inference, nonfinite_weights
from finetune.kept import require_free_folder, require_room, whole_folder
from finetune.model import (
    adapter_roles,
    base_weights,
    changed_shape,
    open_earlier_run,
    parameters_by_role,
    plan_model,
)
from finetune.serve.card import model_card
from finetune.serve.options import ExportOptions
from ttt import TTTLMModel, ttt_parameters, without_ttt
from ttt.layers.frozen import thaw_linears

logger = logging.getLogger(__name__)

_VERIFIED_FRAMES = 16
_SHORT_CONTEXT_FRAMES = 256
"""What attention of at most this many frames no longer sees is compared as well."""
_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest distance of all logits, relative to their norm. Merged weights are rounded once more."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Files of an export, and the distance of stock `moshi` from our model without TTT."""

    files: list[Path]
    difference: float


@torch.no_grad()
def export_checkpoint(options: ExportOptions) -> Exported:
    """Write the folder, load it into stock `moshi`, and compare.

    Raises:
        UserError: a folder that is not empty, a checkpoint without adapters or whose base nobody
            else has, or one that stock `moshi` computes otherwise; or it cannot be written.
            There is no folder then.
    """
    out = options.out
    require_free_folder(out)
    args = checkpoint_args(options.checkpoint, options.device)
    if options.form == "adapters" and not (args.lora.enable and args.save_adapters):
        raise UserError(
            f"--form: {options.checkpoint} holds no adapters; use --form merged, or train with "
            "lora.enable and save_adapters."
        )
    info = find_base(options.checkpoint, args)
    base = _published_base(args, info) if options.form == "adapters" else None
    require_room(out, _num_bytes(args, info, options))
    # Adapters are for the base as it is published; merged, for the one that they were trained on.
    precision: Precision | None = "bfloat16" if options.form == "adapters" else None
    model, _ = load_for_inference(options.checkpoint, options.device, precision)
    if options.form == "merged" and args.base_precision != "bfloat16":
        thaw_linears(model)
        logger.info(
            "the base was kept in %s: the merged weights are these, in %s again",
            args.base_precision,
            args.param_dtype,
        )
    if problem := nonfinite_weights(model):
        raise UserError(f"--checkpoint: {options.checkpoint}: {problem}.")
    with whole_folder(out) as partial:
        dtype = next(model.parameters()).dtype
        _write_weights(model, args, options, partial, dtype)
        card = model_card(args, options, _write_rest(args, info, options, partial))
        (partial / "README.md").write_text(card, encoding="utf-8")
        codes = _some_codes(model)
        for layer in model.transformer.layers:
            layer.self_attn.context = model.context  # stock moshi has one for all
        with without_ttt(model):
            ours = _logits(model, codes)
        device = model.device
        del model
        difference = _compare(ours, codes, partial, base, dtype, device)
        if not difference <= _MAX_DIFFERENCE[dtype]:
            raise UserError(
                f"{out}: stock moshi's logits are {difference:.1e} of their norm away from the "
                "checkpoint's without TTT, so it was not written; report this."
            )
        seal(partial)
    if options.push is not None:
        _push(out, options.push)
    return Exported(sorted(path for path in out.iterdir() if path.is_file()), difference)


def _num_bytes(args: TrainArgs, info: loaders.CheckpointInfo, options: ExportOptions) -> int:
    """Return the size of an export, but for small files."""
    model = plan_model(dataclasses.replace(args, base_precision="bfloat16"), info)
    weights = _weights_of(model, args, options, next(model.parameters()).dtype).values()
    tensors = [*weights, *ttt_parameters(model).values()]
    files = (info.mimi_weights, info.tokenizer)
    return sum(t.numel() * t.element_size() for t in tensors) + sum(p.stat().st_size for p in files)


def _published_base(args: TrainArgs, info: loaders.CheckpointInfo) -> Path:
    """Return the file of the weights that a checkpoint's adapters are for."""
    if not args.moshi_paths.init_from:
        if args.moshi_paths.random_init:
            raise UserError(
                "--form: these adapters are for random weights, which are in no file; use --form "
                "merged."
            )
        return info.moshi_weights
    base = base_weights(open_earlier_run(args.moshi_paths))
    if base.parent.name == "consolidated" and (base.parents[1] / "args.yaml").is_file():
        raise UserError(
            f"--form: these adapters are for the weights in {base.parents[1]}, which an earlier "
            "run has trained and nobody else has; use --form merged."
        )
    return base


def _write_weights(
    model: TTTLMModel, args: TrainArgs, options: ExportOptions, out: Path, dtype: torch.dtype
) -> None:
    weights = _weights_of(model, args, options, dtype)
    name = "model.safetensors" if options.form == "merged" else "lora.safetensors"
    _save({k: v.cpu().contiguous() for k, v in weights.items()}, out / name)
    # Without layers of TTT, `attention_context` counts none the less.
    if model.ttt_layers or model.ttt_args.attention_context is not None:
        own = {k: v.detach().cpu().contiguous() for k, v in ttt_parameters(model).items()}
        metadata = {"ttt_args": json.dumps(dataclasses.asdict(model.ttt_args))}
        _save(own, out / "ttt.safetensors", metadata)


def _weights_of(
    model: TTTLMModel, args: TrainArgs, options: ExportOptions, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return all weights but TTT's own, or the adapters alone; the model may be on `meta`."""
    if options.form == "merged":
        return dict(merged_weights(model, dtype))
    by_role = parameters_by_role(model)
    return {k: v.detach() for role in adapter_roles(args) for k, v in by_role[role].items()}


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """
    Raises:
        OSError: it cannot be written. Safetensors has an error of its own around the system's.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _write_rest(
    args: TrainArgs, info: loaders.CheckpointInfo, options: ExportOptions, out: Path
) -> dict[str, Any]:
    """Write everything but weights and the card; return what config.json holds."""
    raw = loaders._lm_kwargs if info.raw_config is None else info.raw_config
    config: dict[str, Any] = changed_shape(raw, args.model)
    for key in ("lora", "lora_name", "lora_rank", "lora_scaling"):
        config.pop(key, None)
    if args.model.attention_context is not None:
        config["context"] = args.model.attention_context
    config |= {
        "model_type": "moshi",
        "mimi_name": info.mimi_weights.name,
        "tokenizer_name": info.tokenizer.name,
    }
    if options.form == "merged":
        config["moshi_name"] = "model.safetensors"
    else:
        config |= {"lora": True, "lora_name": "lora.safetensors"}
        config |= {"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling}
    if info.mimi_config is not None:
        config["mimi_config_name"] = "mimi_config.json"
        text = json.dumps(info.mimi_config, indent=2)
        (out / "mimi_config.json").write_text(text, encoding="utf-8")
    for path in (info.mimi_weights, info.tokenizer):
        shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config


def _some_codes(model: TTTLMModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    num_frames = _VERIFIED_FRAMES
    if model.context is not None and model.context <= _SHORT_CONTEXT_FRAMES:
        num_frames += model.context
    audio = torch.randint(0, model.card, (1, model.n_q, num_frames), generator=generator)
    text = torch.randint(0, model.text_card, (1, 1, num_frames), generator=generator)
    return torch.cat([text, audio], dim=1).to(model.device)


def _logits(model: Any, codes: Tensor) -> Tensor:
    """Return all valid logits in one row."""
    out = model(codes)
    kinds = ((out.text_logits, out.text_mask), (out.logits, out.mask))
    return torch.cat([logits[mask].float().flatten() for logits, mask in kinds]).cpu()


def _compare(
    ours: Tensor,
    codes: Tensor,
    out: Path,
    base: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """‖stock − ours‖ / ‖ours‖."""
    info = loaders.CheckpointInfo.from_hf_repo(
        "none",
        moshi_weights=base or out / "model.safetensors",
        lora_weights=out / "lora.safetensors" if base else None,
        # Names in a local config.json would be looked for on the hub.
        mimi_weights=_named(out, "mimi_name"),
        tokenizer=_named(out, "tokenizer_name"),
        config_path=out / "config.json",
        mimi_config_path=out / "mimi_config.json" if (out / "mimi_config.json").exists() else None,
    )
    stock = info.get_moshi(device=device, dtype=dtype)
    theirs = _logits(stock, codes)
    return float((theirs - ours).norm() / ours.norm())


def _named(out: Path, key: str) -> Path:
    return out / json.loads((out / "config.json").read_text())[key]


def _push(out: Path, repo: str) -> None:
    from huggingface_hub import HfApi

    from finetune.model import HUB_ERRORS

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        # One that was there stays as it was.
        if not api.repo_info(repo).private:
            raise UserError(
                f"--push: {repo} is public, and everybody could read the weights; make it private "
                f"in its settings, or name another. What was exported is in {out}."
            )
        api.upload_folder(repo_id=repo, folder_path=out)
    except UserError:
        raise
    except (*HUB_ERRORS, ValueError) as error:
        raise UserError(
            f"--push: {repo} was not written ({type(error).__name__}: {str(error)[:200]}). Log in "
            f"with `hf auth login`; what was exported is in {out}."
        ) from None
