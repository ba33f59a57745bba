"""TAP devices in other network namespaces: what a node writes to its interface, we read, and the other way round."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import pack

from faults.lab.errors import LabError
from faults.lab.segments import VNET_BYTES

DEVICE = Path("/dev/net/tun")
NETNS_DIR = Path("/run/netns")
INTERFACE = "eth0"

# include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_CLONE_NEWNET = 0x40000000


def why_no_tap() -> str | None:
    """Why this process cannot make TAP devices and namespaces, or None if it can."""
    if os.geteuid() != 0:
        return "needs root: it makes network namespaces and TAP devices"
    if not DEVICE.exists():
        return f"there is no {DEVICE}: the kernel module tun is not loaded, or this container was not given the device"
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_why_not_here).result()


def _why_not_here() -> str | None:
    """Try both in a namespace that ends with this thread, so that nobody outside sees the device."""
    try:
        _check(_libc().unshare(_CLONE_NEWNET))
    except OSError as error:
        return f"the kernel refuses a network namespace: {error.strerror} (does this container have CAP_SYS_ADMIN?)"
    try:
        os.close(_make_tap())
    except OSError as error:
        return f"the kernel refuses a TAP device: {error.strerror} (does this container have CAP_NET_ADMIN?)"
    return None


def open_tap(namespace: str) -> int:
    """Make the interface of a node and return its descriptor (not blocking); both end together.

    Raises:
        LabError: there is no such namespace, or the kernel refuses.
    """
    with Descriptor(os.open("/proc/self/ns/net", os.O_RDONLY)) as home:
        try:
            with Descriptor(os.open(NETNS_DIR / namespace, os.O_RDONLY)) as there:
                enter_network(there)
            return _make_tap()
        except OSError as error:
            raise LabError(f"no TAP device in {namespace}: {error.strerror or error}") from error
        finally:
            enter_network(home)


def _make_tap() -> int:
    tap = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, pack("16sH22x", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(tap, _TUNSETVNETHDRSZ, pack("i", VNET_BYTES))
        # Frames of up to 64 KB with open checksums: the price of a frame is paid 40 times less often.
        fcntl.ioctl(tap, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    except OSError:
        os.close(tap)
        raise
    return tap


def enter_network(namespace_fd: int) -> None:
    """Move this thread into a network namespace (`os.setns` is there from Python 3.12 on)."""
    _check(_libc().setns(namespace_fd, _CLONE_NEWNET))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))


class Descriptor:
    """A file descriptor that is closed at the end of a `with`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
