"""Names that were probably meant where there is none of the name that was given."""

import difflib
from collections.abc import Iterable, Sequence

_SYNONYMS = {
    "batch": "batch_size",
    "checkpoint_freq": "ckpt_freq",
    "learning_rate": "optim.lr",
    "num_steps": "max_steps",
    "out": "run_dir",
    "output_dir": "run_dir",
    "overwrite": "overwrite_run_dir",
    "save_freq": "ckpt_freq",
    "steps": "max_steps",
    "train_steps": "max_steps",
    "lr_ttt": "optim.ttt_lr",
    "optim.ttt.lr": "optim.ttt_lr",
    "ttt.lr": "optim.ttt_lr",
    "ttt_learning_rate": "optim.ttt_lr",
}
"""Keys of a run by what other programs, and commands of this one, call the same; spelling alone
would lead from them to something else."""


def similar_keys(unknown: str, known: Sequence[str]) -> list[str]:
    """Return the keys, most often one, that were probably meant: those of the same section first,
    as another section's key of a similar name is another thing.

    Args:
        known: all there are, by dotted name.
    """
    alike = unknown.lower().replace("-", "_")
    if unknown in known or alike in known:
        return [] if unknown in known else [alike]
    section, dot, name = alike.rpartition(".")
    sections = {_section(key) for key in known} - {""}
    section = next(iter(_close(section, sections, cutoff=0.6)), section)
    meant = [_SYNONYMS.get(word, "") for word in (alike, f"{section}{dot}{name}", name)]
    meant = [key for key in meant if key in known]
    inside = {_last(key): key for key in known if section and _section(key) == section}
    for key in meant:
        if key in inside.values():
            return [key]
    if close := _close(name, inside):
        return [inside[close[0]]]
    if section and meant and meant[0] == _SYNONYMS.get(f"{section}.{name}"):
        return meant[:1]
    by_name = {_last(key): key for key in reversed(known)}
    if meant or name in by_name:
        return list(dict.fromkeys([*meant[:1], *filter(None, [by_name.get(name)])]))
    return _close(alike, known) or [by_name[each] for each in _close(name, by_name)]


def _close(word: str, known: Iterable[str], cutoff: float = 0.75) -> list[str]:
    return difflib.get_close_matches(word[:100], list(known), n=1, cutoff=cutoff)


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _last(key: str) -> str:
    return key.rpartition(".")[2]
