"""`python -m finetune SUBCOMMAND` is `moshi-ttt SUBCOMMAND`, for launchers that want a module.

All programs begin here, so that Ctrl-C is a message from the first import on. As soon as the
command line is read, `finetune.interrupt` sees to it.
"""

import atexit
import os
import signal
import sys
from types import FrameType


def begin(program: str) -> None:
    """Do what the command line says, of `moshi-ttt` or `train.py`, and leave with its status."""
    # Where a shell has it ignored, as of what runs in the background, it stays so until then.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
        # The first to be registered is the last to be called. Then Python takes itself apart, and
        # has no handlers any more: the signal would take the place of the exit status.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        from finetune.cli import COMMANDS, train
        from finetune.command_line import call

        sys.exit(call(train if program == "train.py" else COMMANDS, name=program))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, _leave)
        sys.stderr.write("\nstopped by SIGINT\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        # All is done, and said; a traceback is all that Python could add while it ends.
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, _leave)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave_with_message)
    raise KeyboardInterrupt


def _leave_with_message(number: int, frame: FrameType | None) -> None:
    # What is imported has lost the first one, or hangs.
    os.write(2, b"\nstopped by SIGINT\n")
    os._exit(128 + number)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def main() -> None:
    begin("moshi-ttt")


if __name__ == "__main__":
    main()
