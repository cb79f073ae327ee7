"""Where the files of a base model are: on the hub, in a local folder, or one by one."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from moshi.models import loaders

from finetune.config import FOLDER, REPOSITORY, ModelPaths
from finetune.errors import UserError
from finetune.model.adapters import require_base
from finetune.model.hub import HUB_ERRORS, is_reachable
from finetune.safety import read_json, start_of, stays_inside

_AT_RANDOM = ", or set moshi_paths.random_init: true to begin with random weights"


def find_checkpoint(
    paths: ModelPaths, *, with_weights: bool = True, is_new_run: bool = False
) -> loaders.CheckpointInfo:
    """Return where everything is that a run starts from: on the hub, in a local folder, or file by
    file.

    Args:
        with_weights: the language model's weights are needed as well, if the run starts from them;
            else they are neither looked for nor downloaded.
        is_new_run: nothing was trained on these weights yet, so that random ones would do as well.

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
        config = read_object(config_path, "moshi_paths.config_path")
        names = dict(config)
        if folder is not None and paths.config_path is None and paths.moshi_path is None:
            require_base(folder, config)

    locate = partial(_located, folder=folder, config_path=config_path, is_new_run=is_new_run)
    mimi_config_name = names.pop("mimi_config_name", None)
    mimi_config = None
    if paths.mimi_config_path or mimi_config_name:
        file = locate("mimi_config_path", paths.mimi_config_path, mimi_config_name or "")
        mimi_config = read_object(file, "moshi_paths.mimi_config_path")
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


def _located(
    key: str,
    given: str | None,
    name: str,
    *,
    folder: Path | None,
    config_path: Path | None,
    is_new_run: bool,
) -> Path:
    """Return where one of a base's files is.

    Args:
        given: what the key says; None: the file of this name in the base's folder.
        config_path: what has said the name.

    Raises:
        UserError: it is not there, or would not be in the folder.
    """
    if given is not None:
        path = Path(given)
    elif folder is None:
        raise UserError(
            f"moshi_paths.{key}: needed, because moshi_paths.hf_repo_id is null. Name the "
            f"file, or set hf_repo_id to a repository or folder that has it."
        )
    elif isinstance(name, str) and stays_inside(name):
        path = folder / name
    else:
        raise UserError(
            f"moshi_paths.{key}: {config_path} names {name!r}, which is not in its folder. "
            f"Name the file yourself, if you trust it."
        )
    if not path.is_file():
        others = _AT_RANDOM if is_new_run and key == "moshi_path" else ""
        raise UserError(
            f"moshi_paths.{key}: there is no file {path}; correct the path{others}."
            f"{start_of(path, key)}"
        )
    return path


def find_recorded(made_with: Path, paths: ModelPaths) -> loaders.CheckpointInfo:
    """Find what a checkpoint was trained on.

    Args:
        made_with: the checkpoint's `args.yaml`, which has `paths`.

    Raises:
        UserError: naming that file, and what is missing.
    """
    try:
        if paths.init_from:
            FOLDER.require(Path(paths.init_from), "moshi_paths.init_from")
        return find_checkpoint(paths)
    except UserError as error:
        # Earlier versions wrote down paths as they were given.
        names = [paths.hf_repo_id or "/", *dict(paths.on_this_machine()).values()]
        is_absolute = all(Path(name).is_absolute() for name in names)
        elsewhere = "" if is_absolute else ", or work in the folder in which its run was started"
        raise UserError(
            f"{made_with}: {error} The checkpoint needs this base: put it there, or a link to "
            f"where it lies now{elsewhere}."
        ) from error


def _from_hub(repo: str, paths: ModelPaths, with_weights: bool) -> loaders.CheckpointInfo:
    REPOSITORY.require(repo, "moshi_paths.hf_repo_id")
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


def read_object(path: Path, key: str) -> dict[str, Any]:
    """Return the object that a model's JSON file holds.

    Args:
        key: what names the file, for messages.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        found = read_json(path)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} is not valid: expected an object {{…}} of keys and values.")
    return found
