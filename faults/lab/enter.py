"""Start a command on a node: `enter.py NAMESPACE HOST_NAME HOSTS_FILE COMMAND...` (by path; imports nothing of ours).

The command gets the network of the node, its host name, and its own view of /etc/hosts; all else is the machine's. It
replaces this process, so it has the process id that the caller knows.
"""

import ctypes
import os
import socket
import sys

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
NOT_ENTERED = 126
NOT_FOUND = 127


def main() -> int:
    """Become the command; returns only where that fails."""
    namespace, host_name, hosts, *command = sys.argv[1:]
    try:
        _enter(namespace, host_name, hosts)
    except OSError as error:
        print(f"error: cannot enter {namespace}: {error}", file=sys.stderr)
        return NOT_ENTERED
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: cannot run {command[0]!r} on {host_name}: {error.strerror}", file=sys.stderr)
    return NOT_FOUND


def _enter(namespace: str, host_name: str, hosts: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    network = os.open(namespace, os.O_RDONLY)
    check(libc.setns(network, _CLONE_NEWNET))
    os.close(network)
    check(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS))
    # What is mounted here stays here; what is unmounted outside (the namespace itself) goes here too.
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None))
    check(libc.mount(hosts.encode(), b"/etc/hosts", None, ctypes.c_ulong(_MS_BIND), None))
    socket.sethostname(host_name)


if __name__ == "__main__":
    sys.exit(main())
