"""The task `pairs`: of two recordings, which one does the model find likelier?

score.py reads the pairs and scores recordings; summary.py and figure.py tell what came out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.evaluation.tasks.base import Found, Json, Task
from finetune.evaluation.tasks.pairs.options import PairsOptions
from finetune.kept import write_whole
from finetune.report import Table, plain, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune.evaluation.bench import Bench, Inputs
    from finetune.evaluation.tasks.pairs.score import Pair


_SCORES = "zerospeech.txt"
"""Of the good recordings and the bad ones, in the form of the challenge."""


class Pairs(Task):
    """Accuracy of preferring the good recording of each pair, over all pairs and by group."""

    name = "pairs"
    title = "Paired likelihood"
    options = PairsOptions
    uses_recordings = False
    common_options = ("batch_size", "block_frames")
    more_files = (_SCORES,)

    def runs_unasked(self, options: PairsOptions) -> bool:
        return options.pairs is not None

    def check(self, options: PairsOptions, *, is_chosen: bool) -> None:
        if is_chosen and options.pairs is None:
            raise UserError("--tasks: pairs needs --pairs, the JSONL of the pairs.")
        if not is_chosen and options.pairs is not None:
            raise UserError("--pairs: counts for the task pairs alone; add it to --tasks.")

    def prepare(self, inputs: Inputs, options: PairsOptions) -> list[Pair]:
        from finetune.evaluation.tasks.pairs.score import read_pairs

        assert options.pairs is not None
        return read_pairs(options.pairs)

    def run(self, bench: Bench, options: PairsOptions, prepared: list[Pair]) -> Json:
        from finetune.evaluation.tasks.pairs.score import PairScorer, zerospeech_lines
        from finetune.evaluation.tasks.pairs.summary import summarize_pairs

        settings = {"side": options.pair.side, "text": options.pair.text}
        work = PairScorer(
            bench.model,
            bench.codec,
            prepared,
            options=options.pair,
            batch_size=bench.options.batch_size,
            block_frames=bench.options.block_frames,
            records=bench.records(self.name, settings),
        )
        work.run()
        found = work.results()
        summary = summarize_pairs(prepared, found, work.missing, options.pair)
        bench.missing[self.name] = [f"{id}: {why}" for id, why in summary["missing"].items()]
        lines = zerospeech_lines(prepared, found, options.pair)
        write_whole(bench.options.out / _SCORES, "".join(f"{line}\n" for line in lines))
        return summary

    def sentences(self, found: Found) -> Iterable[str]:
        from finetune.statistics import proportion

        accuracy = found["all"]["accuracy"]
        if accuracy["value"] is None:
            return [f"None of the {found['num_pairs']} pairs could be scored."]
        num_scored = found["all"]["num_scored"]
        all_right = proportion(num_scored, num_scored)
        if all_right.low is None or all_right.low <= 0.5:
            verdict = "too few pairs to tell that from chance"
        elif accuracy["low"] > 0.5:
            verdict = "better than chance"
        elif accuracy["high"] < 0.5:
            verdict = "worse than chance"
        else:
            verdict = "not shown to differ from chance"
        missing = f"; {found['num_missing']} more are missing" if found["num_missing"] else ""
        return [
            f"Of {num_scored} pairs, the good one is found likelier in a share of "
            f"{plain(accuracy)}: {verdict}{missing}."
        ]

    def why_nothing(self, found: Found) -> str:
        if found["all"]["accuracy"]["value"] is not None:
            return ""
        pair, reason = next(iter(found["missing"].items()))
        rest = len(found["missing"]) - 1
        more = f" (and {rest} more pairs)" if rest else ""
        return f"--pairs: no pair could be scored. {pair}: {reason}{more}"

    def note(self, found: Found) -> str:
        options = found["options"]
        norm = "divided by the number of frames" if options["length_norm"] == "mean" else "as it is"
        return (
            "Accuracy: the share of pairs whose good recording is likelier; a tie counts as half; "
            "Wilson's 95 % interval. The log-likelihood is the sum over frames of "
            f"text × {options['text_weight']:g}, first codebook × "
            f"{options['first_codebook_weight']:g}, other codebooks × "
            f"{options['other_codebooks_weight']:g}, {norm}. Mono speech is on the side of "
            f"{options['side']}; the other side hears silence; the text is {options['text']}."
        )

    def figure(self, found: Found, model: Found) -> Figure:
        from finetune.evaluation.tasks.pairs.figure import pairs_figure

        return pairs_figure(found)

    def tables(self, found: Found) -> Sequence[Table]:
        rows = [
            [
                name,
                group["num_scored"],
                group["num_missing"],
                group["num_ties"],
                plain(group["accuracy"]),
                signed(group["mean_difference"]),
            ]
            for name, group in _groups(found)
        ]
        columns = ("group", "pairs", "missing", "ties", "accuracy", "mean difference, nats")
        return [Table(columns, rows)]

    def csv(self, found: Found) -> Table:
        rows = [list(score.values()) for score in found["scores"]]
        return Table(("id", "group", "good", "bad", "missing"), rows)

    def scalars(self, found: Found) -> dict[str, float | None]:
        return {f"{name}/accuracy": group["accuracy"]["value"] for name, group in _groups(found)}


def _groups(found: Found) -> list[tuple[str, Any]]:
    """Return name and results of all pairs together, and of each group."""
    return [("all", found["all"]), *found["groups"].items()]


TASK = Pairs()
