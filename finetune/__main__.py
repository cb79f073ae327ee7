"""`python -m finetune SUBCOMMAND` is `moshi-ttt SUBCOMMAND`, for launchers that want a module.

All programs begin here, so that Ctrl-C is a message from the first import on. As soon as the
command line is read, `finetune.interrupt` sees to it.
"""

import signal
import sys


def begin(program: str) -> None:
    """Do what the command line says, of `moshi-ttt` or `train.py`, and leave with its status."""
    try:
        from finetune.cli import COMMANDS, train
        from finetune.command_line import call

        sys.exit(call(train if program == "train.py" else COMMANDS, name=program))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped by SIGINT\n")
        sys.exit(128 + signal.SIGINT)


def main() -> None:
    begin("moshi-ttt")


if __name__ == "__main__":
    main()
