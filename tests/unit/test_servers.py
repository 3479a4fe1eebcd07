"""Which server of a URL is used: the one that takes writes, found soon whatever the others do."""

import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg2
import pytest

from service.db.servers import Servers, divided
from tests.support.waiting import until

GIVEN = {"dbname": "batch", "host": "a,b", "port": "1,2"}
TIMEOUT_S = 30.0


class Connection:
    """A connection to a fake server, over a real socket."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._own, self._peer = socket.socketpair()
        self._peer.settimeout(0)
        self.is_closed = False

    def fileno(self) -> int:
        return self._own.fileno()

    def close(self) -> None:
        self.is_closed = True
        self._own.close()

    @property
    def is_cut(self) -> bool:
        """True once it was shut down."""
        try:
            return self._peer.recv(1) == b""
        except BlockingIOError:
            return False


class Cluster:
    """Servers by host: `silent` ones do not answer until the end, others refuse unless they are the `primary`."""

    def __init__(self) -> None:
        self.primary: str | None = None
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self.made: list[Connection] = []
        self.is_over = threading.Event()

    def connect(self, given: Mapping[str, Any], timeout_s: float) -> Connection:
        host = given["host"]
        self.asked.append(host)
        if host in self.silent:
            self.is_over.wait(timeout_s)
            raise psycopg2.OperationalError(f"{host} timed out")
        if host != self.primary:
            raise psycopg2.OperationalError(f"{host} is read-only")
        self.made.append(Connection(host))
        return self.made[-1]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster; whoever still waits for a silent server is released at the end."""
    made = Cluster()
    yield made
    made.is_over.set()
    for connection in made.made:
        connection.close()


@pytest.fixture
def servers(cluster: Cluster) -> Servers:
    """The two servers of `GIVEN`."""
    return Servers(divided(GIVEN), cluster.connect)


def test_a_url_is_divided() -> None:
    """Each server has its host, address and port; one port may be that of all."""
    assert divided(GIVEN) == [{"host": "a", "port": "1"}, {"host": "b", "port": "2"}]
    assert divided({"host": "a,b", "port": "5"}) == [{"host": "a", "port": "5"}, {"host": "b", "port": "5"}]
    assert divided({"hostaddr": "1.1.1.1,2.2.2.2"}) == [{"hostaddr": "1.1.1.1"}, {"hostaddr": "2.2.2.2"}]
    assert divided({"host": "a", "port": "5"}) == [{}]
    assert divided({"service": "batch"}) == [{}]


def test_a_silent_server_holds_nobody_up(cluster: Cluster, servers: Servers) -> None:
    """The first server of the URL keeps silent: the second one is used, from then on without asking the first."""
    cluster.silent, cluster.primary = {"a"}, "b"
    assert servers.connect(GIVEN, TIMEOUT_S).host == "b"
    assert servers.connect(GIVEN, TIMEOUT_S).host == "b"
    assert cluster.asked.count("a") == 1


def test_a_promotion_is_noticed_while_another_keeps_silent(cluster: Cluster, servers: Servers) -> None:
    """A standby that refused is asked again as long as another server has not answered at all."""
    cluster.silent = {"a"}
    found: list[Connection] = []
    thread = threading.Thread(target=lambda: found.append(servers.connect(GIVEN, TIMEOUT_S)))
    thread.start()
    until(lambda: cluster.asked.count("b") == 2, "the standby to be asked again")
    cluster.primary = "b"
    thread.join(TIMEOUT_S)
    assert [connection.host for connection in found] == ["b"]


def test_all_refuse(cluster: Cluster, servers: Servers) -> None:
    """When all have answered and none takes writes, the error has all causes."""
    with pytest.raises(psycopg2.OperationalError) as caught:
        servers.connect(GIVEN, TIMEOUT_S)
    assert str(caught.value) == "a is read-only\nb is read-only"
    assert sorted(cluster.asked) == ["a", "b"]


def test_one_thread_searches_for_all(cluster: Cluster, servers: Servers) -> None:
    """Of many threads that need a connection, one asks all servers."""
    cluster.silent, cluster.primary = {"a"}, "b"
    threads = [threading.Thread(target=servers.connect, args=(GIVEN, TIMEOUT_S)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cluster.asked.count("a") == 1


def test_connections_to_the_old_server_are_cut(cluster: Cluster, servers: Servers) -> None:
    """Once another server takes writes, what waits for the old one ends at once, and new connections go there."""
    cluster.primary = "a"
    old = [servers.connect(GIVEN, TIMEOUT_S) for _ in range(3)]
    assert not any(connection.is_cut for connection in old)
    cluster.primary = "b"
    new = servers.connect(GIVEN, TIMEOUT_S)
    assert new.host == "b"
    assert all(connection.is_cut for connection in old)
    assert not new.is_cut


def test_slow_calls_find_out_that_their_server_is_gone(cluster: Cluster, servers: Servers) -> None:
    """A look on behalf of a slow call cuts it if another server takes writes, and changes nothing otherwise."""
    cluster.primary = "a"
    slow = servers.connect(GIVEN, TIMEOUT_S)
    servers.look(GIVEN, TIMEOUT_S)
    until(lambda: _is_looked(cluster, 2), "the look at the server that is there")
    assert not slow.is_cut
    other = Servers(divided(GIVEN), cluster.connect)
    slow = other.connect(GIVEN, TIMEOUT_S)
    cluster.primary = "b"
    other.look(GIVEN, TIMEOUT_S)
    until(lambda: slow.is_cut, "the slow call to be cut")


def _is_looked(cluster: Cluster, connections: int) -> bool:
    return len(cluster.made) == connections and cluster.made[-1].is_closed


def test_nobody_keeps_what_came_too_late(cluster: Cluster) -> None:
    """A connection that another server grants after one was found is closed."""
    granted = threading.Event()

    def connect(given: Mapping[str, Any], timeout_s: float) -> Connection:
        if given["host"] == "a":
            granted.wait(timeout_s)
        return cluster.connect({"host": "b"}, timeout_s)

    cluster.primary = "b"
    servers = Servers(divided(GIVEN), connect)
    kept = servers.connect(GIVEN, TIMEOUT_S)
    granted.set()
    until(lambda: len(cluster.made) == 2 and cluster.made[1].is_closed, "the late one to be closed")
    assert not kept.is_closed


def test_a_single_server_is_used_as_it_is(cluster: Cluster) -> None:
    """With one server nothing is searched or retried: its error is that of the call."""
    given: Mapping[str, Any] = {"host": "a"}
    servers = Servers(divided(given), cluster.connect)
    with pytest.raises(psycopg2.OperationalError, match=r"^a is read-only$"):
        servers.connect(given, TIMEOUT_S)
    cluster.primary = "a"
    assert servers.connect(given, TIMEOUT_S).host == "a"
