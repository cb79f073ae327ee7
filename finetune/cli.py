"""The command line: `moshi-ttt SUBCOMMAND`, and `train.py`, which is `moshi-ttt train`."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire

from finetune.errors import UserError


def main() -> None:
    sys.exit(
        run(
            lambda: fire.Fire(
                {
                    "train": train,
                    "generate": generate,
                    "plot": plot,
                    "demo": demo,
                    "demo-data": demo_data,
                },
                name="moshi-ttt",
            )
        )
    )


def run(command: Callable[[], Any]) -> int:
    """Run `command`; a user's mistake is a message, not a traceback. Returns the exit status."""
    try:
        status = command()
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status if isinstance(status, int) else 0


def train(config: str, **overrides: Any) -> int:
    """Train as a YAML file says.

    Args:
        config: the YAML file; see docs/configuration.md.
        overrides: any of its keys, dotted: --optim.lr=1e-4 --ttt.chunk_size=64 --resume
    """
    from finetune.config import load_config
    from finetune.trainer import Trainer

    return Trainer(load_config(config, overrides)).train()
