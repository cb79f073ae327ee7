"""Measured continuations become means with intervals, and alarms."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation.tasks.base import Json
from finetune.evaluation.tasks.health.measure import MEASURES, SHARES, alarms, limits, means
from finetune.statistics import Bootstrap, of_shares


def summarize_health(records: Sequence[Mapping[str, Any]], *, seed: int = 0) -> Json:
    """Means of the measures with intervals, beside those of the recordings, and alarms."""
    results = [{kind: r[kind] for kind in ("generated", "recorded")} for r in records]
    bootstrap = Bootstrap(len(results), seed=seed)
    own, usual = means(results, "generated"), means(results, "recorded")
    limit = limits(usual)
    ones = np.ones(len(results))

    def estimate(kind: str, name: str) -> Json:
        values = np.array([result[kind][name] for result in results])
        found = bootstrap.ratio(values, ones)
        return dataclasses.asdict(of_shares(found) if name in SHARES else found)

    return {
        "num_continuations": len(results),
        "measures": {
            name: {
                "generated": estimate("generated", name),
                "recorded": estimate("recorded", name),
                "alarm_if": limit[name],
            }
            for name in MEASURES
        },
        "alarms": [dataclasses.asdict(alarm) for alarm in alarms(own, usual)],
    }
