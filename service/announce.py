"""The address that a host announces, and whether the other hosts on its Postgres can reach it."""

from collections.abc import Sequence

from service.addresses import bare, is_loopback
from service.db.heartbeats import SeenBeat
from service.machine import Place


class AddressError(Exception):
    """This host announces an address that the others cannot reach."""


ADVICE = "Set BATCH_HOST to an address of this host that the others reach."


def is_elsewhere(seen: SeenBeat, place: Place) -> bool:
    """True for a worker that does not share our 127.0.0.1, as far as that is known."""
    network = seen.beat.place.network
    return bool(network and place.network) and network != place.network


def is_reachable(seen: SeenBeat, place: Place) -> bool:
    """False for a worker elsewhere that announces its own loopback address: at that address there is another."""
    return not (is_elsewhere(seen, place) and is_loopback(_host(seen.beat.address)))


def problem(host: str, beats: Sequence[SeenBeat], place: Place) -> str:
    """Why a host that announces `host` cannot work with those that beat now; "" if it can."""
    others = [seen for seen in beats if seen.lease_left_s > 0 and is_elsewhere(seen, place)]
    if not is_loopback(bare(host)) or not others:
        return ""
    beat = others[0].beat
    return f"other hosts use this Postgres ({beat.worker_id} at {beat.address}), and they cannot reach {host}"


def _host(address: str) -> str:
    return bare(address.rpartition(":")[0])
