"""supervisord over XML-RPC, each call with a deadline."""

import http.client
import socket
import xmlrpc.client
from dataclasses import dataclass
from typing import Any
from xml.parsers.expat import ExpatError

from supervisor.xmlrpc import Faults, SupervisorTransport, UnixStreamHTTPConnection

from watchdog.policy import State


class SupervisorAwayError(Exception):
    """supervisord cannot be reached, does not answer in time, or is shutting down."""


class RefusedError(Exception):
    """supervisord answered that it will not: no such process, no such program, cannot spawn."""


@dataclass(frozen=True)
class ProcessInfo:
    """A process as supervisord has it. `pid` 0: none."""

    state: State
    pid: int


class Supervisor:
    """Asks and orders. Every call has a connection of its own, so that all threads may share this."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`url` as `unix:///path`."""
        self._url = url
        self._timeout_s = timeout_s

    def processes(self, group: str) -> list[str]:
        """Names of the processes of a group. Raises SupervisorAwayError."""
        return [info["name"] for info in self._call("getAllProcessInfo") if info["group"] == group]

    def info(self, name: str) -> ProcessInfo:
        """State and pid of `group:process`. Raises SupervisorAwayError, RefusedError when there is no such process."""
        info = self._call("getProcessInfo", name)
        state = info["statename"]
        return ProcessInfo(State(state) if state in State.__members__ else State.UNKNOWN, info["pid"])

    def start(self, name: str) -> None:
        """Orders a start; one that is under way is good. Raises SupervisorAwayError, RefusedError."""
        self._order("startProcess", name, Faults.ALREADY_STARTED)

    def stop(self, name: str) -> None:
        """Orders a stop; one that has happened is good. Raises SupervisorAwayError, RefusedError."""
        self._order("stopProcess", name, Faults.NOT_RUNNING)

    def _order(self, method: str, name: str, fault_for_done: int) -> None:
        try:
            # Without waiting: supervisord would answer only at the end, up to stopwaitsecs later.
            self._call(method, name, False)
        except RefusedError as error:
            if not isinstance(error.__cause__, xmlrpc.client.Fault) or error.__cause__.faultCode != fault_for_done:
                raise

    def _call(self, method: str, *arguments: object) -> Any:
        with xmlrpc.client.ServerProxy("http://supervisor", _Transport(self._url, self._timeout_s)) as proxy:
            try:
                return getattr(proxy.supervisor, method)(*arguments)
            except xmlrpc.client.Fault as error:
                if error.faultCode == Faults.SHUTDOWN_STATE:
                    raise SupervisorAwayError("it is shutting down") from error
                raise RefusedError(error.faultString) from error
            except (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError) as error:
                raise SupervisorAwayError(str(error) or type(error).__name__) from error


class _Transport(SupervisorTransport):  # type: ignore[misc]
    """supervisor's own, which has no deadline, with one."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(None, None, url)
        self._get_connection = lambda: _Connection(url.removeprefix("unix://"), timeout_s)


class _Connection(UnixStreamHTTPConnection):  # type: ignore[misc]
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self.socketfile = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.socketfile)
