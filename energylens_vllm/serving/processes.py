"""Which process is it? From Linux's /proc, for processes of this user."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")
_LISTENS = "0A"  #: the state TCP_LISTEN in /proc/net/tcp


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended and only waits to be noticed."""
    try:
        return _stat(pid)[0] != "Z"
    except (OSError, ValueError, IndexError):
        return False


def descendants(pid: int) -> set[int]:
    """Its children, theirs, and so on."""
    parents = {}
    for path in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.name)] = int(_stat(int(path.name))[1])
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in {pid, *found}} - found:
        found |= new
    return found


def listener_of(port: int) -> int | None:
    """The process that listens on a TCP port, None if there is none that this user may look into. Of several that share
    it (workers of one server), the oldest."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for path in sorted(PROC.glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            for handle in (path / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(handle) in sockets:
                        return int(path.name)
    return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; the name before may hold anything."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _inodes(port: int) -> set[str]:
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / name).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTENS and int(columns[1].rpartition(":")[2], 16) == port:
                    found.add(columns[9])
    return found
