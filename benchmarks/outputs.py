"""Results of a benchmark are printed and kept as they come."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.kept import Output, require_outputs, write_whole


def json_file(text: str) -> Path:
    """Return the path of a new file that can be written, for argparse.

    It is tried at once: a benchmark of many minutes must not end with "no such folder".

    Raises:
        argparse.ArgumentTypeError: it cannot be written, or something is there: numbers of another
            machine, most often.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_outputs([Output(path, "file")])
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from error
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def folder(text: str) -> Path:
    """Return the path of a folder that is there, and is made if it was not, for argparse.

    Raises:
        argparse.ArgumentTypeError: it cannot be made.
    """
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be made: {error.strerror}") from error
    return path


def print_and_keep(
    results: Iterable[dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
    page: Mapping[str, Any],
    path: Path | None,
) -> list[dict[str, Any]]:
    """Print each result as it comes, and write it into the file with those before it.

    So a run that ends early has left what it found.

    Args:
        page: what the file has beside `results`.
    """
    found = []
    for result in results:
        found.append(result)
        print(line(result), flush=True)
        if path:
            write_whole(path, json.dumps({**page, "results": found}, indent=2) + "\n")
    return found


def settings(machine: str, options: argparse.Namespace, torch_version: str) -> dict[str, str]:
    """Return what a file of results says of the machine, by name, and of the options, which have a
    device of their own (cuda, cpu)."""
    return {
        "machine": machine,
        "torch": torch_version,
        **{key: str(value) for key, value in vars(options).items()},
    }
