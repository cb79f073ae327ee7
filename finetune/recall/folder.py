"""The folder of an experiment: one experiment in each, and its report."""

from pathlib import Path

from finetune.errors import UserError
from finetune.kept import make_folder, write_whole
from finetune.recall.options import EXPERIMENT


def prepare_folder(out: Path, experiment: str) -> None:
    """Make the folders and write to them, before hours are spent on what could not be kept.

    Raises:
        UserError: that is impossible, or another experiment's results are there: they have the same
            names, and would be replaced.
    """
    for folder in (out, out / "runs"):
        try:
            make_folder(folder)
            trial = folder / ".trial"
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise UserError(f"--out: cannot write to {folder}: {error.strerror}.") from error
    mark = out / EXPERIMENT
    earlier = mark.read_text(encoding="utf-8").strip() if mark.is_file() else experiment
    if earlier != experiment:
        raise UserError(
            f"--out: {out} has the results of another experiment ({earlier}), which those of this "
            f"one ({experiment}) would replace. Name another folder."
        )
    write_whole(mark, f"{experiment}\n")


def write_report(text: str, out: Path) -> str:
    write_whole(out / "report.md", text + "\n")
    return text
