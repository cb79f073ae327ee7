"""A configuration becomes a model: build, load, add LoRA, mark what trains."""

import logging
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from moshi.models import loaders
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors import SafetensorError
from torch import nn

from finetune.config import LoraArgs, ModelArgs, TrainArgs
from finetune.data import Codec
from finetune.errors import UserError
from finetune.model.adapters import no_base
from finetune.model.base_precision import (
    freeze_base,
    require_bitsandbytes,
    require_precision,
    require_widths,
)
from finetune.model.compilers import require_compiler
from finetune.model.fill import Sharder, WeightFiles, fill
from finetune.model.init_from import (
    EarlierRun,
    base_weights,
    describe_start,
    open_earlier_run,
    require_fit,
    trained_files,
)
from finetune.model.roles import parameters_by_role, training_roles
from finetune.model.trainable_shape import require_trainable
from finetune.safety import safetensors_problem
from ttt import TTTLMModel, build_model

logger = logging.getLogger(__name__)

# Keys of a checkpoint's config.json that are about LoRA, or outdated: not the model's shape.
_NOT_SHAPE = ("lora", "lora_rank", "lora_scaling", "depformer_causal")


def model_shape(info: loaders.CheckpointInfo) -> dict[str, Any]:
    """The keyword arguments of `LMModel` for this checkpoint, Moshi 7B's if it names none.

    Raises:
        UserError: a checkpoint that cannot be fine-tuned.
    """
    config = dict(loaders._lm_kwargs if info.lm_config is None else info.lm_config)
    if config.get("quantize"):
        raise UserError(
            "moshi_paths: these weights are quantized, and quantized weights cannot be trained. "
            "Use the bf16 repository."
        )
    if info.lora_weights is not None or config.get("lora"):
        raise no_base("moshi_paths: by their config.json (lora) these are LoRA adapters")
    require_trainable(config)
    return _with_known_names(config)


def _with_known_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that may be about the shape, as `LMModel` calls them."""
    shape = {key: value for key, value in config.items() if key not in _NOT_SHAPE}
    if not shape.get("conditioners", True):
        del shape["conditioners"]  # there are none
    if "demux_second_stream" in shape:
        shape["demux_second_text_stream"] = shape.pop("demux_second_stream")
    return shape


def changed_shape(shape: Mapping[str, Any], args: ModelArgs) -> dict[str, Any]:
    """A model's shape, or its config.json, with what `args` changes for random weights."""
    chosen = {
        "norm": args.norm,
        "gating": args.gating,
        "positional_embedding": args.positional_embedding,
    }
    changed = dict(shape) | {key: value for key, value in chosen.items() if value is not None}
    if args.gating is not None:
        # The depth transformer takes what is not said of it from the main one.
        changed.setdefault("depformer_gating", shape.get("gating", "none"))
    return changed


def plan_model(
    args: TrainArgs, info: loaders.CheckpointInfo, *, compile: bool = False
) -> TTTLMModel:
    """The model of a configuration on `meta`, with its trainable parameters marked.

    Raises:
        UserError: an impossible TTT configuration, or a config.json that is none of a Moshi.
    """
    try:
        model = build_model(
            changed_shape(model_shape(info), args.model),
            args.ttt,
            device="meta",
            dtype=getattr(torch, args.param_dtype),
            gradient_checkpointing=args.gradient_checkpointing,
            selective_layers=args.selective_layers,
            compile=compile,
            attention_context=args.model.attention_context,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    except (TypeError, KeyError, AssertionError) as error:
        raise UserError(
            f"moshi_paths.config_path: the config.json of these weights does not describe a Moshi: "
            f"{_brief(error)}"
        ) from error
    if args.lora.enable:
        add_lora(model, args.lora, seed=args.seed)
    freeze_base(model, args.base_precision)
    for role, named in parameters_by_role(model).items():
        for parameter in named.values():
            parameter.requires_grad_(role in training_roles(args))
    return model.train()


def require_machine(args: TrainArgs, device: torch.device) -> None:
    """Check that this machine has what a run on `device` needs, whatever its model.

    Raises:
        UserError: it lacks a compiler, a package, or a GPU of the kind.
    """
    compile = _compiles(args, device)
    require_compiler(device, compile=compile, dtype=getattr(torch, args.param_dtype))
    require_precision(args.base_precision, device)
    if args.optim.state == "int8":
        require_bitsandbytes("optim.state: int8")


def _compiles(args: TrainArgs, device: torch.device) -> bool:
    return device.type == "cuda" if args.compile is None else args.compile


def load_model(
    args: TrainArgs,
    info: loaders.CheckpointInfo,
    device: torch.device | str,
    sharder: Sharder | None = None,
    *,
    check: Callable[[TTTLMModel], None] | None = None,
    is_new_run: bool = True,
) -> TTTLMModel:
    """The model to train, on `device`, with its trainable parameters marked.

    New parameters are drawn from `args.seed` alone: every process, and every later run of the same
    configuration, starts from the same ones.

    Args:
        sharder: cuts the model between processes while it is loaded.
        check: called with the model on `meta`, before any of its weights are made or read.
        is_new_run: a checkpoint of the run itself does not take the place of what is read.

    Raises:
        UserError: weights that do not fit the model, an impossible TTT configuration, or no
            compiler for what runs on the device.
    """
    paths, device = args.moshi_paths, torch.device(device)
    require_machine(args, device)
    shape = changed_shape(model_shape(info), args.model)
    earlier = open_earlier_run(paths) if paths.init_from else None
    if earlier is not None:
        there = _with_known_names(earlier.config)
        require_fit(earlier, args, shape, {key: there.get(key) for key in shape})
    model = plan_model(args, info, compile=_compiles(args, device))
    require_widths(model, args.base_precision, device)
    if check is not None:
        check(model)
    files = _weight_files(model, args, info, earlier)
    if earlier is not None and is_new_run:
        logger.info(describe_start(args, earlier))
    scale = shape.get("layer_scale")
    fill(
        model,
        files,
        device,
        seed=args.seed,
        layer_scales={
            "transformer": scale,
            "depformer": shape.get("depformer_layer_scale", scale),
        },
        sharder=sharder,
    )
    return model


def _weight_files(
    model: TTTLMModel,
    args: TrainArgs,
    info: loaders.CheckpointInfo,
    earlier: EarlierRun | None,
) -> WeightFiles:
    """Find the weights that a run starts from and that are not random."""
    files = WeightFiles()
    if earlier is not None:
        files.add_base(base_weights(earlier), model, "moshi_paths.init_from")
        for path, names in trained_files(model, args, earlier):
            files.add_exactly(path, names, model)
    elif not args.moshi_paths.random_init:
        files.add_base(info.moshi_weights, model, "moshi_paths.moshi_path")
    return files


def frozen_fingerprint(
    model: TTTLMModel, args: TrainArgs, info: loaders.CheckpointInfo
) -> str | None:
    """Return what tells the frozen weights that a run trains on from others: see
    `WeightFiles.fingerprint`.

    Args:
        model: may be on `meta`.

    Raises:
        UserError: weights that do not fit the model, or are not there.
    """
    paths = args.moshi_paths
    earlier = open_earlier_run(paths) if paths.init_from else None
    return _weight_files(model, args, info, earlier).fingerprint(model, args.seed)


def build_codec(
    info: loaders.CheckpointInfo,
    model: TTTLMModel,
    device: torch.device | str | None = None,
    *,
    word_start: Literal["auto", "always", "never"] = "auto",
) -> Codec:
    """Mimi and the text tokenizer of a checkpoint, for the streams of `model`.

    Args:
        device: where Mimi computes when it is needed; None: where the model is.
        word_start: see `data.word_start`.

    Raises:
        UserError: they cannot be read, or do not fit the model.
    """
    user_codebooks = model.n_q - model.dep_q
    problem = safetensors_problem(info.mimi_weights)
    if problem is not None:
        raise UserError(f"moshi_paths.mimi_path: {info.mimi_weights}: {problem}")
    try:
        mimi = loaders.get_mimi(
            info.mimi_weights,
            info.mimi_config,
            num_codebooks=max(model.dep_q, user_codebooks),
        )
    except (
        OSError, RuntimeError, AssertionError, KeyError, TypeError, SafetensorError,
    ) as error:  # fmt: skip
        raise UserError(
            f"moshi_paths.mimi_path: {info.mimi_weights} does not hold the Mimi that "
            f"moshi_paths.mimi_config_path describes (null: Moshi's own): {_brief(error)}"
        ) from error
    if mimi.cardinality > model.card:
        raise UserError(
            f"moshi_paths.mimi_path: Mimi has {mimi.cardinality} codes a codebook, and the model "
            f"reads {model.card} (card)."
        )
    try:
        tokenizer = info.get_text_tokenizer()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"moshi_paths.tokenizer_path: {info.tokenizer} is no SentencePiece model: {error}"
        ) from error
    if tokenizer.vocab_size() > model.text_card:
        raise UserError(
            f"moshi_paths.tokenizer_path: the tokenizer has {tokenizer.vocab_size()} pieces, and "
            f"the model reads {model.text_card} (text_card)."
        )
    return Codec(
        mimi,
        tokenizer,
        moshi_codebooks=model.dep_q,
        user_codebooks=user_codebooks,
        text_padding_id=model.text_padding_token_id,
        end_of_text_padding_id=model.end_of_text_padding_id,
        zero_token_id=model.zero_token_id,
        word_start=word_start,
        device=device or model.device,
    )


def _brief(error: Exception) -> str:
    """Return an error's kind and the beginning of its message, which may list every weight there
    is."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")


def add_lora(model: TTTLMModel, args: LoraArgs, *, seed: int) -> None:
    """Wrap every linear layer; at the start the adapters change nothing."""
    torch.manual_seed(seed)
    replace_all_linear_with_lora(model, args.rank, args.scaling)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            # The package leaves both factors random, which would change the model at once.
            nn.init.zeros_(module.lora_B.weight)
