"""Results of a benchmark are printed and kept as they come."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.kept import write_whole


def json_file(text: str) -> Path:
    """Return the path of a file that can be written, for argparse.

    It is tried at once: a benchmark of many minutes must not end with "no such folder".

    Raises:
        argparse.ArgumentTypeError: it cannot be written.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file in it.")
    try:
        if path.exists():
            write_whole(path, path.read_bytes())
        else:
            write_whole(path, "")
            path.unlink()
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
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


def settings(device: str, options: argparse.Namespace, torch_version: str) -> dict[str, str]:
    """Return what a file of results says of the machine and of the options."""
    return {
        "device": device,
        "torch": torch_version,
        **{key: str(value) for key, value in vars(options).items()},
    }
