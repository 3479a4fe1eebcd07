"""What requests of a new batch may ask for: what this worker serves, and what others do. Pure."""

from collections.abc import Set
from dataclasses import dataclass, field, replace

import grpc

from service.db.served import Served
from service.errors import WORKER_LOADING, WORKER_OFFLINE, ApiError

# Until a worker that is away or loading may be there.
AWAY_S = 15.0
LOADING_S = 5.0


class AwayError(ApiError):
    """UNAVAILABLE: new work has to wait until somebody serves one of `models`."""

    def __init__(self, reason: str, message: str, models: Set[str], retry_delay_s: float) -> None:
        names = {"models": ", ".join(sorted(models))}
        super().__init__(grpc.StatusCode.UNAVAILABLE, message, reason, names, retry_delay_s)
        self.models = models


@dataclass(frozen=True)
class Offer:
    """What this worker serves, and what is known of others. `require_live`: a model that is away is refused for now."""

    models: Set[str]
    urls: Set[str]
    others: Served = field(default_factory=Served)
    require_live: bool = False

    @property
    def known(self) -> Set[str]:
        """All models that somebody serves, or did when it was last seen."""
        return self.models | self.others.urls.keys()

    def knows(self, model: str) -> bool:
        """True if it is one of these."""
        return model in self.models or model in self.others.urls

    def endpoints(self, others: Served) -> Set[str]:
        """All endpoints that this worker or one of the `others` serves, or did when it was last seen."""
        return frozenset(self.urls).union(*others.urls.values())

    def urls_of(self, model: str | None) -> Set[str]:
        """The endpoints that a request for the model may name; for one that names none those of this worker."""
        if model is None or model in self.models:
            return self.urls
        return self.others.urls.get(model) or self.urls

    def for_endpoint(self, url: str, others: Served) -> "Offer":
        """The same for a batch all of whose requests are for one endpoint."""
        at = {model: urls & {url} if urls else urls for model, urls in others.urls.items()}
        return replace(self, urls=self.urls & {url}, others=replace(others, urls=at))

    def check_live(self, model: str, place: str) -> None:
        """Raises UNAVAILABLE for a known model that nobody serves now, if that is required."""
        if self.require_live and model not in self.models | self.others.live:
            message = f"{place}: no worker serves {model} now, and require_live is set"
            raise AwayError(WORKER_OFFLINE, message, {model}, AWAY_S)

    def check_some_live(self, models: Set[str]) -> None:
        """Raises UNAVAILABLE if nobody serves any of the models, all of which are known, now."""
        if not models & (self.models | self.others.live):
            message = f"no worker serves {', '.join(sorted(models))} now"
            raise AwayError(WORKER_OFFLINE, message, models, AWAY_S)

    def check_coming(self, model: str, place: str) -> None:
        """Raises UNAVAILABLE for an unknown model that somebody may serve soon, or that batches wait for."""
        if self.others.is_loading:
            message = f"{place}: no worker is known to serve {model}, but one that is loading may"
            raise AwayError(WORKER_LOADING, message, {model}, LOADING_S)
        if model in self.others.awaited:
            message = f"{place}: no worker serves {model} now, and batches in progress wait for one that does"
            raise AwayError(WORKER_OFFLINE, message, {model}, AWAY_S)
