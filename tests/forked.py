"""Programs in processes of their own that need not import everything first.

They are forks of a server that has: see `programs/fork_server.py`. A test of what is imported, of
what is read from the environment at import, or of streams that are closed starts a real one.
"""

import atexit
import errno
import functools
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parent.parent
SERVER = Path(__file__).parent / "programs/fork_server.py"
COMMAND = "from finetune.__main__ import main; main()"
"""`moshi-ttt ...`."""


_ENVIRONMENT = dict(os.environ)
"""As it is before any test changes it: what libraries read at import is the same for all tests."""


@functools.cache
def _server() -> socket.socket:
    """Start the server of this process; returns where it takes requests."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Its programs hash otherwise than this process.
    variables = _ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    places = [str(REPOSITORY), str(Path(__file__).parent), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(places)
    process = subprocess.Popen(
        [sys.executable, "-u", SERVER, str(there.fileno())],
        cwd=REPOSITORY,
        env=variables,
        pass_fds=[there.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    there.close()

    def end() -> None:
        here.close()
        process.wait(timeout=60)

    atexit.register(end)
    return here


class Program:
    """A program that runs: what tests use of `subprocess.Popen`.

    Args:
        code: what it runs, with `arguments` as its words.
        terminal: its standard streams; without, `stdin`, `stdout` and `stderr` are pipes to it.
        stderr_apart: standard error is not a part of standard output.
    """

    def __init__(
        self,
        code: str,
        *arguments: str | Path,
        environment: dict[str, str] | None = None,
        terminal: int | None = None,
        stderr_apart: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self.args = ["moshi-ttt", *map(str, arguments)]
        request = {
            "code": code,
            "argv": self.args,
            "folder": str(REPOSITORY),
            "environment": os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        }
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        if terminal is None:
            its_input, our_input = os.pipe()
            our_output, its_output = os.pipe()
            its_streams = [its_input, its_output, its_output]
            self.stdin, self.stdout = os.fdopen(our_input, "w"), os.fdopen(our_output)
            if stderr_apart:
                our_errors, its_streams[2] = os.pipe()
                self.stderr = os.fdopen(our_errors)
        else:
            its_streams = [terminal] * 3
        report, its_report = os.pipe()
        self._report = os.fdopen(report)
        sent = [*its_streams, its_report]
        socket.send_fds(_server(), [json.dumps(request).encode()], sent)
        for descriptor in set(sent) - {terminal}:
            os.close(descriptor)
        self.pid = int(self._report.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = int(self._report.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._report.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Close standard input; return what the program writes from now on, once it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            self.stdin.close()
        read: dict[str, str] = {}

        def read_all(name: str, stream: IO[str]) -> None:
            read[name] = stream.read()

        threads = [
            threading.Thread(target=read_all, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr))
            if stream is not None
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return read.get("stdout", ""), read.get("stderr", "")


FINDS_TERMINAL = """
import importlib, sys, finetune.monitoring
importlib.reload(sys.modules["finetune.monitoring.console"])  # rich looks when a console is made
"""


def run_on_terminal(code: str, *arguments: Any, **environment: Any) -> tuple[int, str]:
    """Run `code` on a pseudo-terminal: exit status and all that it wrote."""
    main_end, terminal = pty.openpty()
    process = Program(
        FINDS_TERMINAL + textwrap.dedent(code),
        *map(str, arguments),
        environment={"TERM": "xterm", "COLUMNS": "100"} | environment,
        terminal=terminal,
    )
    os.close(terminal)
    written = b""
    try:
        while data := os.read(main_end, 65536):
            written += data
    except OSError as error:  # how Linux says that the other end is closed
        assert error.errno == errno.EIO
    os.close(main_end)
    return process.wait(timeout=60), written.decode()
