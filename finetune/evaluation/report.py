"""The report: a page with what is concluded, a section for each task, and how it was done."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.evaluation.tasks import TASKS
from finetune.report import Page, Section, Table, svg_element


def report_page(results: Mapping[str, Any]) -> Page:
    """Return the page of `results`, as `run.py` puts them together."""
    model, data = results["model"], results["options"].get("data")
    known = {"step": model["step"], "seed": model["seed"], "data": data}
    origin = [f"{name} {value}" for name, value in known.items() if value is not None]
    return Page(
        title=f"Evaluation of {model['name']}",
        subtitle=" · ".join([model["checkpoint"], model["ttt"], *origin, results["time"]]),
        conclusions=results["conclusions"],
        notes=results["notes"],
        sections=[*_of_tasks(results), _missing(results), _options(results)],
    )


def _of_tasks(results: Mapping[str, Any]) -> Iterator[Section]:
    for name, task in TASKS.items():
        if name in results:
            found = results[name]
            figure = task.figure(found, results["model"])
            yield Section(
                task.title,
                task.note(found),
                None if figure is None else svg_element(figure),
                task.tables(found),
            )


def _missing(results: Mapping[str, Any]) -> Section:
    rows = [[task, what] for task, whats in results["missing"].items() for what in whats]
    note = f"{len(rows)} not counted in anything above." if rows else "None."
    return Section("Missing data", note, tables=[Table(("task", "what"), rows[:200], wraps=True)])


def _options(results: Mapping[str, Any]) -> Section:
    rows = [[name, value] for name, value in results["options"].items()]
    return Section("Options", tables=[Table(("option", "value"), rows, wraps=True)])
