"""Scored recordings become the accuracy of pairs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation.tasks.base import Json
from finetune.evaluation.tasks.pairs.options import PairOptions
from finetune.evaluation.tasks.pairs.score import Pair, log_likelihood
from finetune.statistics import mean, proportion


def summarize_pairs(
    pairs: Sequence[Pair],
    records: Iterable[Mapping[str, Any]],
    missing: Mapping[str, str],
    options: PairOptions,
) -> Json:
    """Accuracy over all pairs and by group; a tie counts as half.

    Pairs with a recording that is missing, or whose score is no number, are counted apart.
    """
    every_score = {record["wav"]: log_likelihood(record, options) for record in records}
    scores = {wav: score for wav, score in every_score.items() if math.isfinite(score)}
    reasons: dict[str, str] = {}
    margins: dict[str, list[float]] = {}
    for pair in pairs:
        margins.setdefault(pair.group, [])
        for wav in (str(pair.good), str(pair.bad)):
            if wav not in scores:
                reasons[pair.id] = missing.get(wav, f"{wav} has no finite score")
        if pair.id not in reasons:
            margins[pair.group].append(scores[str(pair.good)] - scores[str(pair.bad)])
    everything = [margin for group in margins.values() for margin in group]
    groups = {name: _accuracy(group) for name, group in sorted(margins.items())}
    for pair in pairs:
        groups[pair.group]["num_missing"] += pair.id in reasons
    each = [
        {
            "id": pair.id,
            "group": pair.group,
            "good": scores.get(str(pair.good)),
            "bad": scores.get(str(pair.bad)),
            "missing": reasons.get(pair.id, ""),
        }
        for pair in pairs
    ]
    return {
        "scores": each,
        "options": dataclasses.asdict(options),
        "num_pairs": len(pairs),
        "num_missing": len(reasons),
        "missing": reasons,
        "all": _accuracy(everything) | {"num_missing": len(reasons)},
        "groups": groups,
    }


def _accuracy(margins: Sequence[float]) -> Json:
    ties = sum(margin == 0 for margin in margins)
    wins = sum(margin > 0 for margin in margins)
    return {
        "num_scored": len(margins),
        "num_ties": ties,
        "num_missing": 0,
        "accuracy": dataclasses.asdict(proportion(wins + ties / 2, len(margins))),
        "mean_difference": dataclasses.asdict(mean(np.array(margins, dtype=float))),
    }
