"""A configuration becomes a model: find the files, build, load, add LoRA, mark what trains."""

import logging
import textwrap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants
from moshi.models import loaders
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors import SafetensorError
from torch import nn

from finetune.config import LoraArgs, ModelArgs, ModelPaths, TrainArgs
from finetune.data import Codec
from finetune.errors import UserError
from finetune.model.base_precision import freeze_base, require_bitsandbytes, require_precision
from finetune.model.compilers import require_compiler
from finetune.model.fill import Sharder, WeightFiles, fill
from finetune.model.hub import HUB_ERRORS, is_reachable
from finetune.model.init_from import (
    EarlierRun,
    describe_start,
    open_earlier_run,
    require_fit,
    trained_files,
)
from finetune.model.roles import parameters_by_role, training_roles
from finetune.model.trainable_shape import require_trainable
from finetune.safety import read_json, safetensors_problem, stays_inside
from ttt import TTTLMModel, build_model

logger = logging.getLogger(__name__)
_AT_RANDOM = ", or set moshi_paths.random_init: true to begin with random weights"

# Keys of a checkpoint's config.json that are about LoRA, or outdated: not the model's shape.
_NOT_SHAPE = ("lora", "lora_rank", "lora_scaling", "depformer_causal")


def find_checkpoint(paths: ModelPaths, *, with_weights: bool = True) -> loaders.CheckpointInfo:
    """Return where everything is that a run starts from: on the hub, in a local folder, or file by
    file.

    Args:
        with_weights: the language model's weights are needed as well, if the run starts from them;
            else they are neither looked for nor downloaded.

    Raises:
        UserError: naming what is missing.
    """
    repo = paths.hf_repo_id
    with_weights = with_weights and not paths.random_init and not paths.init_from
    if repo is not None and not Path(repo).is_dir():
        return _from_hub(repo, paths, with_weights)
    folder = None if repo is None else Path(repo)

    config_path = (
        Path(paths.config_path) if paths.config_path else folder and folder / "config.json"
    )
    config: dict[str, Any] | None = None
    names = {}
    if config_path is not None:
        config = _read_json(config_path, "moshi_paths.config_path")
        names = dict(config)

    def locate(key: str, given: str | None, name: str) -> Path:
        if given is None and folder is None:
            raise UserError(
                f"moshi_paths.{key}: needed, because moshi_paths.hf_repo_id is null. Name the "
                f"file, or set hf_repo_id to a repository or folder that has it."
            )
        if given is None and not (isinstance(name, str) and stays_inside(name)):
            raise UserError(
                f"moshi_paths.{key}: {config_path} names {name!r}, which is not in its folder. "
                f"Name the file yourself, if you trust it."
            )
        path = Path(given) if given is not None else folder / name  # type: ignore[operator]
        if not path.is_file():
            others = _AT_RANDOM if key == "moshi_path" else ""
            raise UserError(
                f"moshi_paths.{key}: there is no file {path}; correct the path{others}."
            )
        return path

    mimi_config_name = names.pop("mimi_config_name", None)
    mimi_config = None
    if paths.mimi_config_path or mimi_config_name:
        mimi_config_file = locate(
            "mimi_config_path", paths.mimi_config_path, mimi_config_name or ""
        )
        mimi_config = _read_json(mimi_config_file, "moshi_paths.mimi_config_path")
    moshi_name = names.pop("moshi_name", loaders.MOSHI_NAME)
    return loaders.CheckpointInfo(
        moshi_weights=(
            locate("moshi_path", paths.moshi_path, moshi_name) if with_weights else Path(moshi_name)
        ),
        mimi_weights=locate(
            "mimi_path", paths.mimi_path, names.pop("mimi_name", loaders.MIMI_NAME)
        ),
        tokenizer=locate(
            "tokenizer_path",
            paths.tokenizer_path,
            names.pop("tokenizer_name", loaders.TEXT_TOKENIZER_NAME),
        ),
        model_type=names.pop("model_type", "moshi"),
        lora_weights=names.pop("lora_name", None),
        lm_config=None
        if config is None
        else {
            key: value
            for key, value in names.items()
            if key not in ("lm_gen_config", "tts_config", "stt_config", "model_id")
        },
        raw_config=config,
        mimi_config=mimi_config,
    )


def _from_hub(repo: str, paths: ModelPaths, with_weights: bool) -> loaders.CheckpointInfo:
    if not is_reachable():
        constants.HF_HUB_OFFLINE = True  # what is in the cache still serves
    try:
        with warnings.catch_warnings():
            # `moshi` says this of every repository that it cannot reach as well.
            warnings.filterwarnings("ignore", "Repository .* contains no config.json")
            info = loaders.CheckpointInfo.from_hf_repo(
                repo,
                # Where they are not needed, the weights are not downloaded.
                moshi_weights=paths.moshi_path if with_weights else Path("none"),
                mimi_weights=paths.mimi_path,
                tokenizer=paths.tokenizer_path,
                config_path=paths.config_path,
                mimi_config_path=Path(paths.mimi_config_path) if paths.mimi_config_path else None,
            )
    except HUB_ERRORS as error:
        raise UserError(
            f"moshi_paths.hf_repo_id: {repo!r} is no local folder, and cannot be had from the "
            f"Hugging Face hub ({type(error).__name__}). Check its name and the network; for a "
            f"private repository, log in with `hf auth login`. A downloaded copy works as well: "
            f"set hf_repo_id to its folder."
        ) from error
    for key, name in (info.raw_config or {}).items():
        if key.endswith("_name") and isinstance(name, str) and not stays_inside(name):
            raise UserError(
                f"moshi_paths.hf_repo_id: {key} in the config.json of {repo} is {name!r}, which is "
                f"not in the repository. Name the file yourself, if you trust it."
            )
    return info


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        found = read_json(path)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} is not valid: expected an object {{…}} of keys and values.")
    return found


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
        raise UserError(
            "moshi_paths: this is a LoRA checkpoint. Train from its base, or from a checkpoint "
            "that was saved with save_adapters: false, which has LoRA merged (TTT starts anew)."
        )
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


def load_model(
    args: TrainArgs,
    info: loaders.CheckpointInfo,
    device: torch.device | str,
    sharder: Sharder | None = None,
    *,
    check: Callable[[TTTLMModel], None] | None = None,
) -> TTTLMModel:
    """The model to train, on `device`, with its trainable parameters marked.

    New parameters are drawn from `args.seed` alone: every process, and every later run of the same
    configuration, starts from the same ones.

    Args:
        sharder: cuts the model between processes while it is loaded.
        check: called with the model on `meta`, before any of its weights are made or read.

    Raises:
        UserError: weights that do not fit the model, an impossible TTT configuration, or no
            compiler for what runs on the device.
    """
    paths, device = args.moshi_paths, torch.device(device)
    compile = device.type == "cuda" if args.compile is None else args.compile
    require_compiler(device, compile=compile, dtype=getattr(torch, args.param_dtype))
    shape = changed_shape(model_shape(info), args.model)
    earlier = open_earlier_run(paths.init_from) if paths.init_from else None
    if earlier is not None:
        there = _with_known_names(earlier.config)
        require_fit(earlier, args, shape, {key: there.get(key) for key in shape})
    model = plan_model(args, info, compile=compile)
    require_precision(model, args.base_precision, device)
    if args.optim.state == "int8":
        require_bitsandbytes("optim.state: int8")
    if check is not None:
        check(model)
    files = WeightFiles()
    if earlier is not None:
        files.add_base(base_weights(earlier), model)
        for path, names in trained_files(model, args, earlier):
            files.add_exactly(path, names, model)
        logger.info(describe_start(args, earlier))
    elif not paths.random_init:
        files.add_base(info.moshi_weights, model)
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


def base_weights(earlier: EarlierRun) -> Path:
    """Return the file that a run's base is in: its own, or the one that it started from.

    Raises:
        UserError: an earlier run, or the file, is not there; or the base was random.
    """
    if earlier.base_weights is not None:
        return earlier.base_weights
    paths = earlier.args.moshi_paths
    if paths.init_from:
        return base_weights(open_earlier_run(paths.init_from))
    if paths.random_init:
        raise UserError(
            f"moshi_paths.init_from: {earlier.checkpoint} holds what was trained on top of random "
            "weights, and not these weights; start from a run with full_finetuning: true."
        )
    return find_checkpoint(paths).moshi_weights


def add_lora(model: TTTLMModel, args: LoraArgs, *, seed: int) -> None:
    """Wrap every linear layer; at the start the adapters change nothing."""
    torch.manual_seed(seed)
    replace_all_linear_with_lora(model, args.rank, args.scaling)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            # The package leaves both factors random, which would change the model at once.
            nn.init.zeros_(module.lora_B.weight)
