"""Available memory is that of a GPU, of this host, and of the control groups that bound it.

A container or a batch system gives a process less than the host has: then the first sign of too
much is that the process is killed, without a word.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Place:
    """Memory that processes take theirs from.

    Attributes:
        key: the same in all processes that share it, and in no others.
        name: how a message calls it.
        free_bytes: what is free, or can be had at once.
    """

    key: str
    name: str
    free_bytes: float


def device_place(device: torch.device) -> Place:
    """Return the memory of a GPU that this process can have."""
    free, total = torch.cuda.mem_get_info(device)
    # PyTorch keeps what it has let go of.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    name = f"{device} ({total / 1e9:.1f} GB, {(total - free) / 1e9:.1f} GB of them taken)"
    return Place(f"{_host_key()} {torch.cuda.get_device_properties(device).uuid}", name, free)


def host_places(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> list[Place]:
    """Return the host's memory, and the control groups that bound it; nothing where the system is
    no Linux, and cannot be asked so."""
    try:
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        free = 1024.0 * kilobytes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return []
    host = Place(_host_key(proc), f"the memory of {socket.gethostname()}", free)
    return [host, *_cgroup_places(proc, cgroups)]


def _host_key(proc: Path = _PROC) -> str:
    """Containers of one host have names of their own, and share its memory."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _cgroup_places(proc: Path, cgroups: Path) -> Iterator[Place]:
    """Yield those with a limit of this process's control group and all that it is in."""
    for folder, limit_file, usage_file, prefix in _own_cgroups(proc, cgroups):
        try:
            limit = int((folder / limit_file).read_text(encoding="utf-8"))
            used = int((folder / usage_file).read_text(encoding="utf-8"))
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            stat = {line.split()[0]: int(line.split()[1]) for line in lines}
            where = folder.stat()
        except (OSError, ValueError, IndexError):
            continue  # "max": no limit; or none of this process's, seen from in a container
        # Pages of files count as used, and are let go of when memory is wanted.
        cached = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        yield Place(
            f"{_host_key(proc)} {where.st_dev}:{where.st_ino}",
            f"the limit of this container or job (cgroup, {limit / 1e9:.1f} GB)",
            max(0, limit - used + cached),
        )


def _own_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield folders, and how their files and the entries of memory.stat are called."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        own = root / path.strip("/")
        for folder in (own, *own.parents):
            yield (folder, *names)
            if folder == root:
                break
