"""The task `spoken_recall`: does the model answer with what the user told it minutes ago?

The user is a script, spoken by espeak-ng (`finetune.spoken`); measure.py lets the model hear it and
speak, figure.py shows what came out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.evaluation.tasks.base import Found, Json, Task
from finetune.evaluation.tasks.spoken_recall.options import (
    ALL_ARMS,
    Arm,
    RecallOptions,
    SpokenRecallOptions,
)
from finetune.report import Table, duration_text, plain, signed
from finetune.spoken import (
    ARM_LABELS,
    FORMAT,
    Talk,
    crosses_window,
    example_table,
    guessing_text,
    make_talk,
    question_json,
    recall_csv,
    recall_tables,
    score_words,
    summarize_recall,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune.evaluation.bench import Bench, Inputs


class SpokenRecall(Task):
    """Share of right answers by the time since the user told the fact."""

    name = "spoken_recall"
    title = "Spoken recall"
    options = SpokenRecallOptions
    uses_recordings = False
    common_options = ("batch_size", "seed")

    def check(self, options: SpokenRecallOptions, *, is_chosen: bool) -> None:
        if not is_chosen and options.recall != RecallOptions():
            raise UserError("--recall_…: counts for spoken_recall alone; add it to --tasks.")

    def prepare(self, inputs: Inputs, options: Any) -> list[Talk]:
        wanted, seed = options.recall, options.seed
        numbers = range(wanted.num_talks)
        return [make_talk(wanted, number, seed, prefix="--recall_") for number in numbers]

    def run(self, bench: Bench, options: SpokenRecallOptions, prepared: list[Talk]) -> Json:
        from finetune.data import FRAME_RATE_HZ
        from finetune.evaluation.tasks.spoken_recall.measure import Listening

        wanted = options.recall
        settings = dataclasses.asdict(wanted)
        del settings["max_minutes"]
        more = {"seed": bench.options.seed, "batch_size": bench.options.batch_size}
        records = bench.records(self.name, {**settings, **more, "talks": FORMAT})
        arms: tuple[Arm, ...] = tuple(arm for arm in ALL_ARMS if arm in wanted.arms)
        if not bench.model.ttt_layers:
            arms = ("off",)
            bench.note("This checkpoint has no TTT: it is heard as it is, as the arm `off`.")
        work = Listening(bench, prepared, arms, wanted, records)
        work.run()
        if work.num_left:
            bench.note(
                f"{work.num_left} of {len(prepared) * len(arms)} talks were not heard within "
                f"--recall_max_minutes ({wanted.max_minutes:g}); the same command goes on."
            )
        talks = {
            talk.index: [question_json(talk, question) for question in talk.questions]
            for talk in prepared
        }
        answers: dict[str, dict[int, list[Json]]] = {arm: {} for arm in arms}
        unhealthy = 0
        for record in records:
            if record["arm"] in answers:
                heard = [(word, start, end) for word, start, end in record["words"]]
                questions = talks[record["talk"]]
                answers[record["arm"]][record["talk"]] = [score_words(q, heard) for q in questions]
                unhealthy += not record["healthy"]
        return {
            **summarize_recall(
                talks,
                answers,
                window_sec=bench.window_frames / FRAME_RATE_HZ,
                seed=bench.options.seed,
            ),
            "num_unhealthy": unhealthy,
        }

    def sentences(self, found: Found) -> Iterable[str]:
        if found["num_unhealthy"]:
            yield (
                f"Warning: in {found['num_unhealthy']} talks the model computed NaN or infinity: "
                "its answers there mean nothing."
            )
        if not found["num_questions"]:
            return
        first, last = (duration_text(found["distances_sec"][end]) for end in (0, -1))
        window_sec = found["window_sec"]
        are_beyond = window_sec is not None and window_sec < found["distances_sec"][0]
        where = ", all beyond attention's window" if are_beyond else ""
        for number, (arm, of) in enumerate(found["arms"].items()):
            asked = (
                f" of {found['num_questions']} questions, {first} to {last} after the fact{where}"
            )
            share = plain(of["all"], 2)
            yield f"{ARM_LABELS[arm]}: the right value in {share}{'' if number else asked}."
        yield guessing_text(found)
        places = {"all": ""}
        if crosses_window(found):
            places["beyond_window"] = " beyond attention's window"
        for difference in found["differences"]:
            one, other = (ARM_LABELS[arm] for arm in difference["arms"])
            for place, where in places.items():
                yield (
                    f"{one} against {other}{where}: {signed(difference[place], 2)}, "
                    f"{_verdict(difference[place])}."
                )

    def why_nothing(self, found: Found) -> str:
        if found["num_questions"]:
            return ""
        return "--recall_max_minutes: no talk was heard to its end by every arm in that time."

    def note(self, found: Found) -> str:
        shown = ""
        if found["window_sec"] is not None:
            shown = f" Attention's window is {duration_text(found['window_sec'])}, in each layer."
        return (
            f"{found['num_talks']} talks of a scripted user, who tells facts first and asks for "
            "each once; the model hears it, speaks freely, and what it says in the silence after "
            f"a question is its answer.{shown} In brackets: 95 % intervals, Wilson's by distance, "
            "where each talk has one question, and by bootstrap over talks elsewhere; differences "
            "are paired. docs/spoken_recall.md has the rules."
        )

    def figure(self, found: Found, model: Found) -> Figure | None:
        from finetune.evaluation.tasks.spoken_recall.figure import recall_figure

        return recall_figure(found) if found["num_questions"] else None

    def tables(self, found: Found) -> Sequence[Table]:
        return [*recall_tables(found), example_table(found)]

    def csv(self, found: Found) -> Table:
        return recall_csv(found)

    def scalars(self, found: Found) -> dict[str, float | None]:
        scalars: dict[str, float | None] = {}
        for arm, of in found["arms"].items():
            scalars[f"{arm}/all"] = of["all"]["value"]
            for point in of["by_distance"]:
                scalars[f"{arm}/{point['distance_sec']:g}_sec"] = point["value"]
        return scalars


def _verdict(difference: Found) -> str:
    if difference["low"] is None:
        return "too few talks to tell"
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "not shown to differ"


TASK = SpokenRecall()
