"""The command that trains on the demonstration's dialogues, from any folder."""

import shlex
from pathlib import Path

CONFIG = Path("example/demo.yaml")
_PROJECT = Path(__file__).parents[2]
"""The checkout, if this is one; of an installed package, where it lies."""


def training_command(dialogues: Path) -> str:
    """Return what trains on these dialogues in the current folder: the configuration, and the
    small model that it names, are in the checkout alone."""
    config, where, model = CONFIG, "", []
    if not config.is_file() and (_PROJECT / config).is_file():
        config = _PROJECT / config
        model = [f"--moshi_paths.hf_repo_id={config.parent / 'demo/model'}"]
    elif not config.is_file():
        where, dialogues = "in the project's folder, where README.md is: ", dialogues.absolute()
    data = [f"--data.{split}_data={dialogues / f'{split}.jsonl'}" for split in ("train", "eval")]
    return f"{where}{shlex.join(['moshi-ttt', 'train', str(config), *data, *model])}"
