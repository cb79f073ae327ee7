"""What codes the model of a run reads, said by small files alone: no weights are needed."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from moshi.models import loaders

from finetune.config import ModelPaths
from finetune.data import ReadCodes
from finetune.model.find import read_object
from finetune.model.trainable_shape import require_trainable
from finetune.safety import stays_inside


def read_codes_of(paths: ModelPaths) -> ReadCodes | None:
    """Return what codes a run's model reads; None: its files are not on this machine, or do not say
    it.

    Raises:
        UserError: a file cannot be read, or is none of a model that is trained here.
    """
    config, mimi_config = dict(loaders._lm_kwargs), dict(loaders._mimi_config)
    if paths.config_path or paths.hf_repo_id:
        file = _here(paths, "config_path", "config.json")
        if file is None:
            return None
        config = read_object(file, "moshi_paths.config_path")
    require_trainable(config)
    name = config.get("mimi_config_name")
    if paths.mimi_config_path or name:
        file = _here(paths, "mimi_config_path", name)
        if file is None:
            return None
        mimi_config = read_object(file, "moshi_paths.mimi_config_path")
    quantizer = mimi_config.get("quantizer")
    num_codes = quantizer.get("bins") if isinstance(quantizer, dict) else None
    n_q, dep_q = config.get("n_q"), config.get("dep_q")
    if not (isinstance(num_codes, int) and isinstance(n_q, int) and isinstance(dep_q, int)):
        return None
    return ReadCodes(max(dep_q, n_q - dep_q), num_codes)


def _here(paths: ModelPaths, key: str, name: Any) -> Path | None:
    """Return where a file of the model is on this machine; None: nowhere.

    Args:
        key: of `paths`, which may name it.
        name: its own, in the repository or folder.
    """
    here = dict(paths.on_this_machine())
    if getattr(paths, key):
        return Path(here[key]) if key in here else None
    if paths.hf_repo_id is None or not (isinstance(name, str) and stays_inside(name)):
        return None
    if "hf_repo_id" in here:
        return Path(paths.hf_repo_id, name)
    known = try_to_load_from_cache(paths.hf_repo_id, name)
    return Path(known) if isinstance(known, str) else None
