"""Runs one Python program that a model has written, where it can do nothing but compute.

    echo '{"program": "print(1 + 1)", "token": "done"}' | python -I sandbox.py

prints the token if the program comes to its end. The program has no network, no files (an empty root), no
other process to see, and nobody's rights; 10 seconds of processor time, 1 GiB of memory, no bytes in files,
and no second process. Linux alone has all of it; this ends with an error where it is missing.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
from importlib import import_module

MODULES = re.findall(
    r"\w+",
    "bisect collections copy datetime decimal fractions functools hashlib heapq itertools math operator "
    "random re statistics string typing",
)
"""What a program may import: it cannot read a file any more."""
NOBODY = 65534
# of Linux' sched.h and prctl.h: CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, PR_SET_PDEATHSIG
NEW_USER, NEW_PROCESSES, NEW_NETWORK, AT_PARENTS_END = 0x10000000, 0x20000000, 0x40000000, 1
SECONDS, MEMORY = 10, 1 << 30


def shut() -> None:
    """Give up everything. Raises OSError where that is not possible."""
    if os.getuid() == 0:  # root's processes have no limit of their number
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_USER | NEW_PROCESSES | NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "no namespaces for a sandbox on this machine")
    if child := os.fork():  # the first process in a namespace is the first that is inside
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    libc.prctl(AT_PARENTS_END, signal.SIGKILL)
    empty = tempfile.mkdtemp()
    os.chdir(empty)
    os.rmdir(empty)  # it stays for this process, and for nobody else: later it could not be removed
    os.chroot(".")
    for what, limit in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def main() -> None:
    asked = json.load(sys.stdin)
    for name in MODULES:
        import_module(name)
    shut()
    said, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
    exec(compile(asked["program"], "program", "exec"), {"__name__": "program"})
    said.write(asked["token"])


if __name__ == "__main__":
    main()
