"""Where a process runs: on which machine, and which processes and addresses it shares with others."""

import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FILE = "machine-id"


@dataclass(frozen=True)
class Place:
    """Where a process runs. An empty part is unknown, and proves nothing.

    `machine`: made at random once in BATCH_HOME, so it survives reboots and is another in each container or home.
    Processes with the same `pid_space` see each other by pid; those with the same `network` share 127.0.0.1. Both
    contain the id of the boot, so they never mean the same after a reboot.
    """

    machine: str = ""
    pid_space: str = ""
    network: str = ""


def here(home: Path | None = None) -> Place:
    """Where this process runs. The machine is that of `home`, and unknown until a server has run there."""
    return Place("" if home is None else _read(home), _namespace("pid"), _namespace("net"))


def settle(home: Path) -> Place:
    """As `here`; gives the machine its id if it has none. Raises OSError."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    keep(home, str(uuid.uuid4()))
    return here(home)


def keep(home: Path, machine: str) -> None:
    """Gives the machine this id if the file with its id is not there, or not any more. Raises OSError.

    What starts later would make another, and take what runs for another machine.
    """
    path = home / FILE
    if path.exists():
        return
    new = home / f"{FILE}.{uuid.uuid4()}"
    try:
        with open(new, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(f"{machine}\n")
            file.flush()
            os.fsync(file.fileno())
        # All programs of a home may start at once: the first decides.
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


def host_name() -> str:
    """This host's name: the one that it had when supervisord started, which may be another by now (DHCP, hostnamectl).

    Programs know each other by it, so one that starts later must not go by a newer name than those that run.
    """
    return os.environ.get("BATCH_HOST_NAME") or socket.gethostname()


def boot_id() -> str:
    """The id of the machine's current boot; "" if unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace(kind: str) -> str:
    boot = boot_id()
    with suppress(OSError):
        return f"{boot}/{os.stat(f'/proc/self/ns/{kind}').st_ino}" if boot else ""
    return ""


def _read(home: Path) -> str:
    with suppress(OSError):
        return (home / FILE).read_text().strip()
    return ""
