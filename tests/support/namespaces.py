"""Mounts and networks that only one test, and the processes it starts, can see."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

_FLAGS = {"mnt": 0x0002_0000, "uts": 0x0400_0000, "net": 0x4000_0000}
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def _own(kind: str, *first: str) -> Iterator[None]:
    """Moves this thread, and the processes that it starts, into a new namespace, and runs the commands `first` there.

    Skips the test where that is not allowed.
    """
    before, folder = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY), os.getcwd()
    try:
        if _libc.unshare(_FLAGS[kind]):
            pytest.skip(f"no namespaces here: {os.strerror(ctypes.get_errno())}")
        try:
            for command in first:
                if subprocess.run(command.split(), capture_output=True, timeout=10).returncode:
                    pytest.skip(f"{command} does not work here")
            yield
        finally:
            if _libc.setns(before, _FLAGS[kind]):
                raise OSError(ctypes.get_errno(), f"cannot return to the {kind} namespace of before")
            # Who enters a mount namespace is at its root.
            os.chdir(folder)
    finally:
        os.close(before)


def own_mounts() -> "AbstractContextManager[None]":
    """A mount namespace; its mounts vanish with the last process in it."""
    return _own("mnt", "mount --make-rprivate /")


@contextmanager
def moving_name(folder: Path) -> Iterator[Callable[[str], None]]:
    """A mount namespace in which the name `moving` stands for 127.0.0.2, or the address that was last given to this."""
    names = folder / "hosts"

    def move(address: str) -> None:
        names.write_text(f"127.0.0.1 localhost\n{address} moving\n")

    with own_mounts():
        move("127.0.0.2")
        _mount("--bind", names, "/etc/hosts")
        yield move


def ipv6_alone() -> "AbstractContextManager[None]":
    """A network namespace whose only address is ::1."""
    return _own("net", "ip link set lo up", "ip address delete 127.0.0.1/8 dev lo")


class Network:
    """A network of its own, as if on another machine: loopback, and `address` on it."""

    def __init__(self, address: str = "10.77.0.1") -> None:
        self.address = address
        add = f"ip address add {address}/32 dev lo"
        with _own("net", "ip link set lo up", add):
            self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and the processes that it starts, are in it."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            if _libc.setns(self._namespace, _FLAGS["net"]):
                raise OSError(ctypes.get_errno(), "cannot enter the network namespace")
            try:
                yield
            finally:
                if _libc.setns(before, _FLAGS["net"]):
                    raise OSError(ctypes.get_errno(), "cannot return to the network namespace of before")
        finally:
            os.close(before)

    def ip(self, command: str) -> None:
        """Runs one of iproute2's commands in it."""
        with self.inside():
            subprocess.run(["ip", *command.split()], check=True, capture_output=True, timeout=10)

    def close(self) -> None:
        """Lets go of it; it vanishes with the last process in it."""
        os.close(self._namespace)


def own_name(host: str) -> "AbstractContextManager[None]":
    """A host name for what is started there: programs of it belong to another host."""
    return _own("uts", f"hostname {host}")


def own_pids() -> Sequence[str]:
    """What a command begins with that has a pid namespace of its own, as in a container: it always has the same pid.

    The first process there passes on its exit status, and whoever kills what was started kills both. Skips the test
    where that is not allowed.
    """
    prefix = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("no pid namespaces here")
    return (*prefix, "sh", "-c", '"$@" & wait $!', "sh")


class Disk:
    """A tmpfs mounted at `path` whose size can be changed."""

    def __init__(self, path: Path, size_mib: int) -> None:
        self._path = path
        _mount("-t", "tmpfs", "-o", f"size={size_mib}m,mode=0755", "tmpfs", path)

    def fill(self) -> None:
        """Shrinks it until no space is left."""
        status = os.statvfs(self._path)
        _mount("-o", f"remount,size={(status.f_blocks - status.f_bfree) * status.f_frsize}", self._path)

    def resize(self, size_mib: int) -> None:
        """Sets its size."""
        _mount("-o", f"remount,size={size_mib}m", self._path)


class FailingDisk:
    """An ext4 file system in the file `image`, mounted at `path`, that can fail as one does whose device has errors."""

    def __init__(self, image: Path, path: Path, size_mib: int) -> None:
        """Skips the test where loop devices cannot be had."""
        self._image = image
        self._path = path
        image.touch()
        os.truncate(image, size_mib << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True, timeout=60)
        try:
            self._mount()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop devices here: {error.stderr.decode()}")
        # mkfs makes it.
        (path / "lost+found").rmdir()

    def _mount(self) -> None:
        _mount("-o", "loop,errors=remount-ro", self._image, self._path)

    def fail(self) -> None:
        """Turns it read-only under whoever writes to it."""
        _mount("-o", "remount,abort", self._path)

    def repair(self) -> None:
        """Unmounts, checks and mounts it again. Nobody may use it meanwhile."""
        subprocess.run(["umount", self._path], check=True, capture_output=True, timeout=60)
        # 1 says that errors were corrected.
        assert subprocess.run(["e2fsck", "-fp", self._image], capture_output=True, timeout=60).returncode in (0, 1)
        self._mount()


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, timeout=10)
