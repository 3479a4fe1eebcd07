"""A serving stack that is lent to one test after another."""

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.batches import count
from tests.support.servers import Stack, new_stack
from tests.support.waiting import until
from vllm_batch import CallError, Client


class Spare:
    """Lends a gateway and a worker, and takes them back without batches; a stack that a test changed is ended."""

    def __init__(self, postgres: str, folder: Callable[[], Path]) -> None:
        self._postgres = postgres
        self._folder = folder
        self._own: Stack | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._cleanup.close()

    def lend(self, stack: Stack) -> None:
        """Makes `stack`, which has started nothing, the one that is lent."""
        own = self._own = self._own or self._started()
        stack.database_url, stack.folder, stack.gateway_port = own.database_url, own.folder, own.gateway_port
        stack.servers = list(own.servers)
        for server in stack.servers:
            server.mark = server.log.stat().st_size

    def take_back(self, stack: Stack) -> None:
        """Removes all batches. If the stack is not what was lent, or that fails, its processes are ended."""
        assert self._own is not None
        is_unchanged = [server.process for server in stack.servers] == self._processes
        if is_unchanged and all(process.poll() is None for process in self._processes) and _emptied(stack):
            stack.servers = []
            stack.folder = self._folder()
        else:
            self._own = None
            self._cleanup.close()

    def _started(self) -> Stack:
        stack = self._cleanup.enter_context(new_stack(self._postgres, self._folder()))
        stack.gateway()
        stack.worker()
        stack.wait_until_accepting()
        self._processes = [server.process for server in stack.servers]
        return stack


def _emptied(stack: Stack) -> bool:
    try:
        with Client(stack.target, patience_s=0) as client:
            for batch in client.list():
                if not batch.HasField("end_time"):
                    client.cancel(batch.id)
            for batch in client.list():
                client.wait(batch.id)
                client.delete(batch.id)
        until(lambda: count(stack, "requests") == count(stack, "batches") == 0, "the rows to be removed")
    except (CallError, AssertionError):
        return False
    return True
