"""Builds the page from what the process has."""

import asyncio
from dataclasses import dataclass, field

from fastapi import APIRouter

from service.clock import Clock
from service.db.connection import Database
from service.db.limits import Limits
from service.http.page import assets, batches, fleet, hosts, live, signing_in
from service.http.page.live import Live
from service.http.page.sessions import Sessions
from service.http.page.signals import Signals
from service.insight.channels import Channels
from service.insight.explainer import Explainer
from service.insight.host_servicer import HostServicer
from service.insight.presence import Presence
from service.insight.servicer import ExplainedServicer


@dataclass
class Page:
    """The page, of a process that knows the workers by `presence`."""

    database: Database
    sessions: Sessions
    presence: Presence
    channels: Channels
    limits: Limits
    clock: Clock
    heartbeat_timeout_s: float
    signals: Signals = field(init=False)
    _ending: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.signals = Signals(self.presence, self.clock)

    def routers(self) -> list[APIRouter]:
        """All that is served under `/` and `/page/`, but for what is OpenAI's."""
        explainer = Explainer(self.database, self.presence, self.clock)
        # Nobody calls what it has no methods for.
        servicer = ExplainedServicer(self.database, self.limits, explainer)  # type: ignore[abstract]
        host_servicer = HostServicer(self.database, self.heartbeat_timeout_s, self.presence)
        following = Live(self.database, servicer, host_servicer, self.presence, self.clock, self._ending)
        return [
            assets.router(),
            signing_in.router(self.sessions),
            live.router(following, self.sessions),
            batches.router(self.database, servicer),
            fleet.router(self.database, self.signals),
            hosts.router(host_servicer),
        ]

    async def follow(self) -> None:
        """Keeps what is known of the workers current, for ever."""
        await asyncio.gather(self.presence.follow(), self.signals.follow())

    async def end(self) -> None:
        """Ends what is sent as it changes, and the channels to workers."""
        self._ending.set()
        await self.channels.close_all()
