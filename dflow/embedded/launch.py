"""Exec another program as a lesser user, tied to the life of its parent. Standard library only; run as a file.

`python -I -S launch.py [--user UID:GID] [--parent-death-signal N --parent PID] -- PROGRAM [ARGUMENT ...]`

Postgres refuses to run as root, so root starts it as another user. That user often cannot pass through the directories
above the data or the binaries (/root is 0700). The capability to read and search everywhere, and nothing else, is
therefore kept across the change of user and across exec as an *ambient* capability (capabilities(7)):
CAP_DAC_READ_SEARCH, or CAP_DAC_OVERRIDE where a container does not grant the former (Docker's default set).

With `--parent-death-signal` the kernel sends N to the program when its parent dies (prctl(2), PR_SET_PDEATHSIG). It is
set last, because a change of user clears it. Exec keeps the process id, so the caller's `Popen.pid` is the program's.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def become(uid: int, gid: int) -> None:
    """Change to another user and group for good, keeping at most one capability: to read and search every file."""
    libc = _libc()
    if libc is not None:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if libc is not None:
        any(_keep_only(libc, capability) for capability in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE))


def _keep_only(libc: ctypes.CDLL, capability: int) -> bool:
    """Reduce this process to one capability that exec keeps; False when it was not ours to keep."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)(_Data(1 << capability, 1 << capability, 1 << capability), _Data(0, 0, 0))
    if libc.capset(ctypes.byref(header), data) != 0:
        return False
    return bool(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0) == 0)


def die_with_parent(signal_number: int, parent: int) -> None:
    """Ask for a signal when the parent dies; leave at once when it already has."""
    libc = _libc()
    if libc is None:
        return
    libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def main(argv: list[str]) -> None:
    """Do what the options say, then become the program."""
    split = argv.index("--")
    options = dict(zip(argv[:split:2], argv[1:split:2], strict=True))
    program = argv[split + 1 :]
    if "--user" in options:
        uid, gid = options["--user"].split(":")
        become(int(uid), int(gid))
    if "--parent-death-signal" in options:
        die_with_parent(int(options["--parent-death-signal"]), int(options["--parent"]))
    try:
        os.execvp(program[0], program)  # noqa: S606 - replacing this process is the purpose
    except OSError as error:
        sys.stderr.write(f"cannot run {program[0]}: {error.strerror}\n")
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
