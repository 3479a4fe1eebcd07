"""The address that a host announces, and whether the other hosts on its Postgres can reach it."""

from collections.abc import Sequence

from service.addresses import bare, is_loopback
from service.db.chunks import host_of
from service.db.heartbeats import SeenBeat
from service.db.watchdogs import SeenWatchdog
from service.machine import Place


class AddressError(Exception):
    """This host announces an address that the others cannot reach."""


ADVICE = "Set BATCH_HOST to an address of this host that the others reach."


def is_elsewhere(network: str, ours: str) -> bool:
    """True if what runs in this network does not share our 127.0.0.1, as far as that is known."""
    return bool(network and ours) and network != ours


def is_reachable(address: str, network: str, ours: str) -> bool:
    """False for what announces a loopback address in a network that is not ours: at that address there is another."""
    return not (is_elsewhere(network, ours) and is_loopback(bare(address.rpartition(":")[0])))


def problem(
    loopback: str, name: str, place: Place, beats: Sequence[SeenBeat], dogs: Sequence[SeenWatchdog] = ()
) -> str:
    """Why the host `name` cannot work with those that beat now; "" if it can.

    `loopback`: what it announces and only it reaches, "" if others reach it (`Settings.advertised_loopback`).

    What ran under its name or on its machine is its own past: a reboot changes the network, and may be faster than the
    end of a lease. A host without workers is known by its watchdog.
    """
    if not loopback:
        return ""

    def is_other(its_name: str, machine: str, network: str) -> bool:
        is_ours = its_name == name or (bool(machine) and machine == place.machine)
        return not is_ours and is_elsewhere(network, place.network)

    others = [
        f"{beat.worker_id} at {beat.address}"
        for beat, left_s in ((seen.beat, seen.lease_left_s) for seen in beats)
        if left_s > 0 and is_other(host_of(beat.worker_id), beat.place.machine, beat.place.network)
    ]
    others += [
        f"{dog.watchdog_id} at {dog.address}"
        for dog in dogs
        if dog.is_alive and is_other(dog.watchdog_id, dog.machine, dog.network)
    ]
    return f"other hosts use this Postgres ({others[0]}), and they cannot reach {loopback}" if others else ""
