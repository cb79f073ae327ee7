"""Started once for many tests: it forks the programs that they start, its imports made already.

Importing torch, moshi and the framework takes seconds, and more than what most of these programs
do then. A forked program has its own process id, streams, environment, folder and signals, and
ends as any other does. Only what Python and the libraries read as they start is the server's.
See `forked.py`, which sends the requests.
"""

import gc
import importlib
import io
import json
import os
import socket
import sys
from typing import Any

FIRST = ("finetune.cli", "finetune.trainer", "finetune.evaluation")
"""What a run imports as it starts: tests ask what is imported with it."""
IMPORTED = (
    "finetune.inference",
    "finetune.serve",
    "finetune.sweep",
    "torch._dynamo",
    "torch.utils.tensorboard",
)


def next_program(connection: socket.socket) -> str:
    """Answer requests; in each process that is to be a program, return its code."""
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 2**20, 4)
        if not message:
            sys.exit()
        # Collected, so that the time they took is in this process's count of its children's.
        while _reap():
            pass
        if os.fork() == 0:
            connection.close()
            return _program(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _program(request: dict[str, Any], descriptors: list[int]) -> str:
    """Fork the program, and tell who asked for it its process id, then its exit status."""
    *streams, report = descriptors
    pid = os.fork()
    if pid:
        for descriptor in streams:
            os.close(descriptor)
        os.write(report, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(report)
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # Python's own know what the server's were: a file, where these are pipes.
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _unbuffered(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _unbuffered(2)  # type: ignore[misc]
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = request["argv"]
    return request["code"]


def _unbuffered(descriptor: int) -> io.TextIOWrapper:
    """Return a standard stream as `python -u` makes it."""
    raw = os.fdopen(descriptor, "wb", buffering=0, closefd=False)
    return io.TextIOWrapper(raw, errors="backslashreplace", write_through=True)


if __name__ == "__main__":
    for name in FIRST:
        importlib.import_module(name)
    with_first = {*sys.modules}
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("light_imports").import_bitsandbytes()
    gc.freeze()
    code = next_program(socket.socket(fileno=int(sys.argv[1])))
    exec(code)
