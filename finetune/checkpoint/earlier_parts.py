"""Parts of a training that had another configuration, as where a run was resumed with other keys.

A checkpoint's args.yaml has the configuration of its last part. Those before are in its info.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.checkpoint.resume_file import frozen_fingerprint_of
from finetune.checkpoint.run_dir import INFO
from finetune.config import TrainArgs, changed_keys, keys_that
from finetune.kept import step_of
from finetune.safety import read_json
from ttt.options import HARMLESS, MEASURED

EARLIER = "earlier_parts"

Part = dict[str, Any]
"""`until_step`: its last step. `before`: keys that were others than in the part after it, with
their values as texts."""

OF_FROZEN_WEIGHTS = {f"moshi_paths.{name}" for name in ("hf_repo_id", "moshi_path", "config_path")}
"""Keys that say where the frozen weights are. Where fingerprints say that these are the same, it is
no difference that they lie elsewhere. `init_from` says from what the others began, too."""


def earlier_parts_of(checkpoint: Path) -> list[Part]:
    """Return the parts of a checkpoint's training before the last one, in order; none where it had
    one configuration throughout, or info.json is damaged."""
    try:
        found = read_json(checkpoint / INFO)[EARLIER]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [part for part in found if _is_part(part)] if isinstance(found, list) else []


def _is_part(part: object) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("until_step"), int):
        return False
    before = part.get("before")
    return isinstance(before, dict) and all(isinstance(value, str) for value in before.values())


def parts_before(args: TrainArgs, checkpoint: Path, base: Mapping[str, str | None]) -> list[Part]:
    """Return the parts of a training that goes on from a checkpoint with a configuration; what
    changes no weight makes no part.

    Args:
        base: the frozen weights that it goes on with, see `frozen_base`.
    """
    unimportant = keys_that(TrainArgs, HARMLESS, MEASURED)
    if frozen_fingerprint_of(checkpoint) == base["fingerprint"] is not None:
        unimportant |= OF_FROZEN_WEIGHTS
    before = {
        key: old
        for key, (old, _) in changed_keys(checkpoint / "args.yaml", args).items()
        if key not in unimportant
    }
    last = [{"until_step": step_of(checkpoint), "before": before}] if before else []
    return earlier_parts_of(checkpoint) + last
