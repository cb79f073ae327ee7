"""What can be done with a run that is finished."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from finetune.config import TrainArgs
from finetune.kept import checkpoints_in


def next_commands(args: TrainArgs) -> Iterator[str]:
    """Yield the commands that come next, with the run's last checkpoint; none if it kept none."""
    found = checkpoints_in(Path(args.run_dir) / "checkpoints")
    if not found:
        return
    checkpoint = shlex.quote(str(found[-1]))
    data = "" if args.data.eval_data else " --data=DATA.jsonl"
    yield f"next: moshi-ttt evaluate {checkpoint}{data}"
    yield f"to hear it: moshi-ttt generate {checkpoint} --audio=CALL.wav"
    yield f"to talk to it: moshi-ttt serve {checkpoint}"
