"""Scored answers become recall by distance, with intervals, beside what guessing would give."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.report import Table, duration_text, plain, signed
from finetune.spoken.facts import KINDS
from finetune.spoken.scoring import OUTCOMES, TimedWord, in_window, outcome, said_value
from finetune.spoken.talk import Question, Talk

if TYPE_CHECKING:
    from finetune.statistics import Array, Bootstrap

Json = dict[str, Any]
Talks = Mapping[Any, Sequence[Json]]
"""Questions, or answers, in their order, by the talk's number or name."""

ARM_LABELS = {
    "on": "TTT on",
    "off": "TTT off",
    "reset": "TTT reset before the question",
    "model": "the model",
}
"""The ways in which a talk can be heard, and their names for people."""
BASELINES = {
    "oldest": "the oldest fact not yet asked for",
    "newest": "the newest fact not yet asked for",
}
"""Ways to answer for who knows what was told and not of whom, and their names for people."""
_MAX_EXAMPLES = 24


def question_json(talk: Talk, question: Question) -> Json:
    """Return all that there is to know of a question; times in seconds from the talk's start."""
    return {
        "distance_sec": question.distance_sec,
        "kind": question.fact.kind,
        "name": question.fact.name,
        "fact": question.fact.sentence,
        "question": question.fact.question,
        "answer": question.fact.value,
        "told_sec": question.told.sec,
        "asked_sec": question.span.sec,
        "window_sec": question.window.sec,
        "told_values": [told.fact.value for told in talk.facts],
        "oldest": question.oldest,
        "newest": question.newest,
    }


def score_words(question: Mapping[str, Any], words: Sequence[TimedWord]) -> Json:
    """Return the answer to a question of `question_json` that is in the words of a whole talk."""
    heard = sorted(in_window(words, *question["window_sec"]), key=lambda word: word[1])
    return score_text(question, " ".join(word for word, _, _ in heard))


def score_text(question: Mapping[str, Any], text: str) -> Json:
    """Return the answer to a question of `question_json`.

    Args:
        text: what was said in the question's window.

    Returns:
        The text, the value that it `said`, or None, and its `outcome`.
    """
    said = said_value(text, question["kind"])
    found = outcome(said, question["answer"], question["told_values"])
    return {"text": text, "said": said, "outcome": found}


def summarize_recall(
    talks: Talks,
    answers: Mapping[str, Talks],
    *,
    window_sec: float | None = None,
    seed: int = 0,
) -> Json:
    """Return recall by distance and over all distances, of every arm, and differences of arms.

    Args:
        talks: questions of `question_json`, by talk.
        answers: of `score_text`, in the order of the questions, by arm and talk. Talks that some
            arm has not heard are left out.
        window_sec: of attention, in one layer; None: it is not known.
        seed: of the bootstrap.
    """
    ids = [talk for talk in talks if all(talk in of for of in answers.values())]
    questions = [question for talk in ids for question in talks[talk]]
    distances_sec = sorted({question["distance_sec"] for question in questions})
    found: Json = {
        "num_talks": len(ids),
        "num_questions": len(questions),
        "distances_sec": distances_sec,
        "window_sec": window_sec,
        "chance": _mean([1 / len(KINDS[q["kind"]].values) for q in questions]),
        "a_told_value": _mean([1 / len(q["told_values"]) for q in questions]),
        "baselines": {name: _baseline(questions, name) for name in BASELINES},
        "arms": {},
        "differences": [],
        "examples": _examples(ids, talks, answers),
    }
    if not questions:
        return found
    from finetune.statistics import Bootstrap, proportion

    bootstrap = Bootstrap(len(ids), seed=seed)
    beyond = [d for d in distances_sec if window_sec is not None and d > window_sec]
    tables = {arm: _RightByTalk(ids, talks, of) for arm, of in answers.items()}
    for arm, table in tables.items():
        by_distance = []
        for distance_sec in distances_sec:
            right, asked = table.sums([distance_sec])
            estimate = proportion(float(right.sum()), int(asked.sum()))
            outcomes = table.outcomes([distance_sec])
            by_distance.append(
                {"distance_sec": distance_sec, **dataclasses.asdict(estimate), "outcomes": outcomes}
            )
        found["arms"][arm] = {
            "all": _ratio(bootstrap, *table.sums(distances_sec)),
            "beyond_window": _ratio(bootstrap, *table.sums(beyond)) if beyond else None,
            "outcomes": table.outcomes(distances_sec),
            "by_distance": by_distance,
        }
    for other in ("off", "reset"):
        if "on" in tables and other in tables:
            places = {"all": distances_sec, "beyond_window": beyond}
            found["differences"].append(
                {
                    "arms": ["on", other],
                    **{
                        place: _difference(bootstrap, tables["on"], tables[other], which)
                        for place, which in places.items()
                    },
                }
            )
    return found


class _RightByTalk:
    """The right answers of an arm, talk by talk."""

    def __init__(
        self,
        ids: Sequence[Any],
        talks: Talks,
        answers: Talks,
    ) -> None:
        self._rows = [
            [
                (question["distance_sec"], answer["outcome"])
                for question, answer in zip(talks[talk], answers[talk], strict=True)
            ]
            for talk in ids
        ]

    def sums(self, distances_sec: Sequence[float]) -> tuple[Array, Array]:
        """Return right answers and questions at some distances, float64 [R] each."""
        import numpy as np

        chosen = [[found for distance, found in row if distance in distances_sec]
                  for row in self._rows]  # fmt: skip
        right = [sum(found == "right" for found in row) for row in chosen]
        return np.array(right, float), np.array([len(row) for row in chosen], float)

    def outcomes(self, distances_sec: Sequence[float]) -> dict[str, int]:
        """Return how often each outcome was at some distances."""
        count = Counter(f for row in self._rows for d, f in row if d in distances_sec)
        return {name: count[name] for name in OUTCOMES}


def _ratio(bootstrap: Bootstrap, right: Array, asked: Array) -> Json:
    from finetune.statistics import of_shares

    return dataclasses.asdict(of_shares(bootstrap.ratio(right, asked)))


def _difference(
    bootstrap: Bootstrap, one: _RightByTalk, other: _RightByTalk, distances_sec: Sequence[float]
) -> Json | None:
    from finetune.statistics import of_shares

    if not distances_sec:
        return None
    (right, asked), (other_right, other_asked) = (x.sums(distances_sec) for x in (one, other))
    estimate = bootstrap.ratio_difference((right, other_right), (asked, other_asked))
    return dataclasses.asdict(of_shares(estimate, least=-1.0))


def _baseline(questions: Sequence[Json], name: str) -> Json:
    def share(of: Sequence[Json]) -> float | None:
        return _mean([float(q[name] == q["answer"]) for q in of])

    distances_sec = sorted({question["distance_sec"] for question in questions})
    return {
        "all": share(questions),
        "by_distance": [
            share([q for q in questions if q["distance_sec"] == distance_sec])
            for distance_sec in distances_sec
        ],
    }


def _examples(
    ids: Sequence[Any],
    talks: Talks,
    answers: Mapping[str, Talks],
) -> list[Json]:
    found = [
        {
            "talk": talk,
            **{key: question[key] for key in ("distance_sec", "fact", "question", "answer")},
            "said": {arm: of[talk][number]["text"] for arm, of in answers.items()},
        }
        for talk in ids
        for number, question in enumerate(talks[talk])
    ]
    return found[:_MAX_EXAMPLES]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- for people -----------------------------------------------------------------------------------


def crosses_window(found: Mapping[str, Any]) -> bool:
    """Return whether attention's window is known to lie between the distances: else what was asked
    beyond it is all that was asked, or nothing."""
    distances_sec = found["distances_sec"]
    return (
        found["window_sec"] is not None
        and distances_sec[0] <= found["window_sec"] < distances_sec[-1]
    )


def recall_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what `summarize_recall` has found."""
    if not found["num_questions"]:
        return []
    arms = found["arms"]
    lines = [
        [
            duration_text(distance_sec),
            *(plain(of["by_distance"][number], 2) for of in arms.values()),
            *(_share(base["by_distance"][number]) for base in found["baselines"].values()),
        ]
        for number, distance_sec in enumerate(found["distances_sec"])
    ]
    means = [_share(base["all"]) for base in found["baselines"].values()]
    if crosses_window(found):
        beyond = [plain(of["beyond_window"], 2) for of in arms.values()]
        lines.append(["beyond attention's window", *beyond, *("" for _ in means)])
    lines.append(["all", *(plain(of["all"], 2) for of in arms.values()), *means])
    outcomes = [
        [
            ARM_LABELS[arm],
            *(f"{n} ({n / found['num_questions']:.0%})" for n in of["outcomes"].values()),
        ]
        for arm, of in arms.items()
    ]
    places = {"all": "all"}
    if crosses_window(found):
        places["beyond_window"] = "beyond attention's window"
    differences = [
        [
            " − ".join(ARM_LABELS[arm] for arm in each["arms"]),
            *(signed(each[place], 2) for place in places),
        ]
        for each in found["differences"]
    ]
    names = [ARM_LABELS[arm] for arm in arms]
    return [
        Table(("from the fact to the question", *names, *BASELINES.values()), lines),
        Table(("compared", *places.values()), differences),
        Table(("what was answered", *OUTCOMES.values()), outcomes),
    ]


def example_table(found: Mapping[str, Any]) -> Table:
    """Return the first questions beside what was said to them."""
    rows = [
        [
            each["fact"],
            duration_text(each["distance_sec"]),
            each["question"],
            *(each["said"][arm] or "–" for arm in found["arms"]),
        ]
        for each in found["examples"]
    ]
    names = [ARM_LABELS[arm] for arm in found["arms"]]
    return Table(("fact", "asked after", "question", *names), rows, wraps=True)


def recall_csv(found: Mapping[str, Any]) -> Table:
    """Return all numbers of what `summarize_recall` has found as one table."""
    rows = [
        [arm, point["distance_sec"], point["count"], *(point[k] for k in ("value", "low", "high")),
         *point["outcomes"].values()]
        for arm, of in found["arms"].items()
        for point in of["by_distance"]
    ]  # fmt: skip
    columns = ("arm", "distance_sec", "questions", "recall", "low", "high", *OUTCOMES)
    return Table(columns, rows)


def guessing_text(found: Mapping[str, Any]) -> str:
    """Return what answers would be right without memory, in a sentence."""
    queue, stack = (found["baselines"][name]["all"] for name in BASELINES)
    return (
        f"Any value of the kind is right in {_share(found['chance'])} of the answers, any value "
        f"that was told in {_share(found['a_told_value'])}, that of the oldest fact not yet asked "
        f"for in {_share(queue)}, that of the newest in {_share(stack)}."
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
