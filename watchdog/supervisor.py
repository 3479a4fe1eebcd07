"""supervisord's XML-RPC API, each call with a deadline."""

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
    """supervisord refused the call: no such process or program, or it cannot spawn."""


@dataclass(frozen=True)
class ProcessInfo:
    """A process as supervisord reports it. `pid` is 0 if there is none; `cause` says why the last start failed.

    `exit_status`: how the last process ended, -1 by a signal.
    """

    state: State
    pid: int
    cause: str = ""
    exit_status: int = 0


class Supervisor:
    """Client of supervisord. Thread-safe: every call opens its own connection."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`url` has the form `unix:///path`."""
        self._url = url
        self._timeout_s = timeout_s

    def processes(self, group: str) -> list[str]:
        """Returns the names of a group's processes. Raises SupervisorAwayError."""
        return [info["name"] for info in self._call("getAllProcessInfo") if info["group"] == group]

    def states(self) -> dict[str, str]:
        """Returns the state of each process, but of those never started, by its name as supervisorctl shows it.

        Raises SupervisorAwayError.
        """
        return {
            info["name"] if info["name"] == info["group"] else f"{info['group']}:{info['name']}": info["statename"]
            for info in self._call("getAllProcessInfo")
            if info["start"]
        }

    def info(self, name: str) -> ProcessInfo:
        """Returns what is known of `group:process`. Raises SupervisorAwayError, RefusedError if there is none."""
        info = self._call("getProcessInfo", name)
        state = info["statename"]
        known = State(state) if state in State.__members__ else State.UNKNOWN
        return ProcessInfo(known, info["pid"], info["spawnerr"], info["exitstatus"])

    def start(self, name: str) -> None:
        """Orders a start; fine if already started. Raises SupervisorAwayError, RefusedError."""
        self._order("startProcess", name, Faults.ALREADY_STARTED)

    def stop(self, name: str) -> None:
        """Orders a stop; fine if already stopped. Raises SupervisorAwayError, RefusedError."""
        self._order("stopProcess", name, Faults.NOT_RUNNING)

    def _order(self, method: str, name: str, fault_for_done: int) -> None:
        try:
            # wait=False: otherwise supervisord answers only once it is done, up to stopwaitsecs later.
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
                    raise SupervisorAwayError("supervisord is shutting down") from error
                raise RefusedError(error.faultString) from error
            except (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError) as error:
                raise SupervisorAwayError(str(error) or type(error).__name__) from error


class _Transport(SupervisorTransport):  # type: ignore[misc]
    """supervisor's transport, with the timeout that it lacks."""

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
