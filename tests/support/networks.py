"""Networks of several hosts on one machine: network namespaces where they can be made, loopback elsewhere."""

import itertools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

# An address of nobody: packets for it are lost without a word, as on a broken line.
NOBODY = "02:00:00:00:00:99"
INJECT = Path(__file__).resolve().parents[1] / "fleet" / "inject"


class Network(Protocol):
    """Gives hosts their addresses and cuts the lines between them."""

    can_cut: bool

    def add(self, name: str) -> str:
        """Adds a machine. Returns its address."""

    def unplug(self, name: str) -> None:
        """Takes a machine off the network for good: nobody hears of its end."""

    def remove(self, name: str) -> None:
        """Removes a machine that was unplugged, with all its sockets."""

    def prefix(self, name: str) -> Sequence[str]:
        """What commands that run on the machine begin with."""

    def cut(self, one: str, other: str) -> None:
        """Loses all packets between two machines."""

    def heal(self, one: str, other: str) -> None:
        """Ends that."""

    def close(self) -> None:
        """Removes all machines."""


class Namespaces:
    """A bridge with a network namespace for each machine, with a host name of its own. The test is on the bridge."""

    can_cut = True
    _numbers = itertools.count()

    def __init__(self) -> None:
        number = os.getpid() * 16 + next(self._numbers)
        self._name = f"vbf{number % 10**7}"
        self._net = f"10.{200 + number % 50}.{number // 50 % 250}"
        self._addresses: dict[str, str] = {}
        self._present: set[str] = set()
        self._cuts: set[frozenset[str]] = set()
        self._ip(f"link add {self._name} type bridge")
        self._ip(f"address add {self._net}.254/24 dev {self._name}")
        self._ip(f"link set {self._name} up")

    def add(self, name: str) -> str:
        """Adds a machine, under the address that one of this name had before."""
        address = self._addresses.setdefault(name, f"{self._net}.{len(self._addresses) + 1}")
        space, link = self._space(name), f"{self._name}{address.rpartition('.')[2]}"
        self._ip(f"netns add {space}")
        self._ip(f"link add {link} type veth peer name eth0 netns {space}")
        self._ip(f"link set {link} master {self._name} up")
        for command in (f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self._ip(f"-n {space} {command}")
        self._present.add(name)
        for pair in self._cuts:
            for other in pair - {name} if name in pair else ():
                self._lose(name, other)
        return address

    def unplug(self, name: str) -> None:
        """Deletes its link; the namespace stays for the processes in it."""
        self._present.discard(name)
        self._ip(f"link delete {self._name}{self._addresses[name].rpartition('.')[2]}")

    def remove(self, name: str) -> None:
        """Deletes the namespace; its processes must have ended."""
        self._ip(f"netns delete {self._space(name)}")

    def prefix(self, name: str) -> Sequence[str]:
        """Enters both namespaces and becomes the command."""
        renamed = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name)
        return ("ip", "netns", "exec", self._space(name), *renamed)

    def cut(self, one: str, other: str) -> None:
        """Each resolves the other's address to one of nobody."""
        if frozenset({one, other}) not in self._cuts:
            self._cuts.add(frozenset({one, other}))
            self._lose(one, other)
            self._lose(other, one)

    def heal(self, one: str, other: str) -> None:
        """Both resolve the addresses again."""
        if frozenset({one, other}) in self._cuts:
            self._cuts.discard(frozenset({one, other}))
            for here, there in ((one, other), (other, one)):
                if here in self._present:
                    self._ip(f"-n {self._space(here)} neighbour delete {self._addresses[there]} dev eth0")

    def _lose(self, here: str, there: str) -> None:
        if here in self._present:
            neighbour = f"{self._addresses[there]} lladdr {NOBODY} nud permanent dev eth0"
            self._ip(f"-n {self._space(here)} neighbour replace {neighbour}")

    def close(self) -> None:
        """Deletes namespaces and bridge."""
        for name in self._addresses:
            subprocess.run(["ip", "netns", "delete", self._space(name)], capture_output=True, timeout=30)
        self._ip(f"link delete {self._name}")

    def _space(self, name: str) -> str:
        return f"{self._name}-{name}"

    def _ip(self, command: str) -> None:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"ip {command}: {done.stderr}"


class Loopback:
    """Addresses of 127.0.0.0/8 and injected host names. Lines cannot be cut, and a dead host's connections end."""

    can_cut = False

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}

    def add(self, name: str) -> str:
        """Nothing to make."""
        return self._addresses.setdefault(name, f"127.0.0.{len(self._addresses) + 2}")

    def unplug(self, name: str) -> None:
        """Nothing to unplug."""

    remove = unplug

    def prefix(self, name: str) -> Sequence[str]:
        """The host's name goes to its Python processes."""
        paths = os.pathsep.join(filter(None, (str(INJECT), os.environ.get("PYTHONPATH"))))
        return ("env", f"FLEET_HOSTNAME={name}", f"PYTHONPATH={paths}")

    def cut(self, one: str, other: str) -> None:
        """Skips the test."""
        pytest.skip("lines between hosts can be cut only where network namespaces can be made")

    heal = cut

    def close(self) -> None:
        """Nothing to remove."""


def network() -> Network:
    """The best that this machine allows. FLEET_LOOPBACK=1: loopback."""
    if os.environ.get("FLEET_LOOPBACK") == "1" or os.geteuid() != 0:
        return Loopback()
    tried = f"vbf{os.getpid()}-try"
    for command in ("add", "delete"):
        if subprocess.run(["ip", "netns", command, tried], capture_output=True, timeout=30).returncode:
            return Loopback()
    return Namespaces()
