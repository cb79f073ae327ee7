"""A model's config.json tells whether this project trains it right; all others are refused."""

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError

_NEEDED = ("dim", "num_layers", "num_heads", "n_q", "dep_q", "card", "text_card", "delays")


def require_trainable(config: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the config.json has no shape, or the shape of a model whose streams are not one
            text, Moshi's codebooks and the user's.
    """
    missing = [key for key in _NEEDED if key not in config]
    if len(missing) > len(_NEEDED) // 2:
        of_transformers = "architectures" in config or "transformers_version" in config
        what = (
            "is that of Hugging Face's transformers"
            if of_transformers
            else f"does not say what shape the model has (it lacks {', '.join(missing)})"
        )
        raise UserError(
            f"moshi_paths.config_path: the config.json of these weights {what}. Set config_path to "
            f"one that has {', '.join(_NEEDED)}, as the repositories of kyutai's PyTorch weights "
            f"have it; without any config.json the shape is Moshi 7B's."
        )
    if config.get("conditioners"):
        raise UserError(
            f"moshi_paths: this model has conditioners ({', '.join(config['conditioners'])}), and "
            f"models with conditioning are not supported: nothing here would give them their input."
        )
    n_q, dep_q = config.get("n_q"), config.get("dep_q")
    if not isinstance(n_q, int) or not isinstance(dep_q, int):
        return  # LMModel says what is wrong
    if dep_q == 0:
        raise UserError(
            "moshi_paths: this model predicts no audio (dep_q is 0 in its config.json), as one for "
            "speech recognition does. Only models that listen and speak are supported."
        )
    if dep_q >= n_q:
        raise UserError(
            f"moshi_paths: this model predicts all codebooks that it reads (dep_q is {dep_q}, n_q "
            f"{n_q} in its config.json), so that no stream is the user's: all audio would come "
            f"from the left channel. Such models are not supported."
        )
