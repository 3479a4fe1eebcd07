"""Tenants: their shares, limits and webhooks, as a file gives them. Pure."""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from service import webhook_targets

# Everybody's, where no token is required.
DEFAULT_TENANT = "default"
# What names of tenants, tokens and certificates are made of.
NAME = r"[A-Za-z0-9_.-]{1,64}"


@dataclass(frozen=True)
class Webhook:
    """Where the events of a tenant's batches go (`url` None: nowhere, unless the batch itself says where), and the path
    of the file with the secrets that sign them.
    """

    secret_file: str
    url: str | None = None


@dataclass(frozen=True)
class Quota:
    """What one tenant may have at once, its weight beside others, its webhook. None: no limit, no webhook."""

    weight: float = 1.0
    open_batches: int | None = None
    queued_requests: int | None = None
    queued_tokens: int | None = None
    calls_per_s: float | None = None
    file_bytes: int | None = None
    webhook: Webhook | None = None

    @property
    def limits_queue(self) -> bool:
        """True if it limits what may be open or queued."""
        return (self.open_batches, self.queued_requests, self.queued_tokens) != (None, None, None)


@dataclass(frozen=True)
class Quotas:
    """The quotas of all tenants: those named have their own, the others share none but have the same."""

    otherwise: Quota = Quota()
    named: Mapping[str, Quota] = field(default_factory=dict)

    def of(self, tenant: str) -> Quota:
        """The quota of one tenant."""
        return self.named.get(tenant, self.otherwise)


def _unless_unlimited(value: Any) -> Any:
    return None if isinstance(value, float) and value == math.inf else value


# TOML's `inf` is how a file says that a tenant has no limit where the others have one.
_Count = Annotated[Annotated[int, Field(ge=1, le=1 << 60)] | None, BeforeValidator(_unless_unlimited)]
_Rate = Annotated[Annotated[float, Field(gt=0, le=1e6)] | None, BeforeValidator(_unless_unlimited)]


class _Table(BaseModel):
    """What a table of the file may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weight: Annotated[float, Field(ge=0.01, le=10_000)] = 1.0
    open_batches: _Count = None
    queued_requests: _Count = None
    queued_tokens: _Count = None
    calls_per_s: _Rate = None
    file_bytes: _Count = None


class _Webhook(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    secret_file: Annotated[str, Field(min_length=1)]
    url: str | None = None

    @field_validator("url")
    @classmethod
    def _is_target(cls, url: str | None) -> str | None:
        if url is not None:
            webhook_targets.split(url)
        return url


class _Tenant(_Table):
    webhook: _Webhook | None = None


_HERE = PurePath()


class _File(_Table):
    tenants: dict[str, _Tenant] = Field(default_factory=dict)


def parse(text: str, folder: PurePath = _HERE) -> Quotas:
    """The quotas in the text of a file in `folder`. Raises ValueError that names each wrong key."""
    try:
        file = _File.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise ValueError("; ".join(map(_problem, error.errors(include_url=False)))) from None
    if wrong := [name for name in file.tenants if not re.fullmatch(NAME, name)]:
        raise ValueError(f"tenants.{wrong[0]}: a name has 1 to 64 letters, digits, dots, hyphens and underscores")
    otherwise = {name: getattr(file, name) for name in _Table.model_fields}
    named = {
        name: Quota(
            **otherwise | table.model_dump(exclude_unset=True, exclude={"webhook"}),
            webhook=Webhook(str(folder / table.webhook.secret_file), table.webhook.url) if table.webhook else None,
        )
        for name, table in file.tenants.items()
    }
    return Quotas(Quota(**otherwise), named)


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _Webhook if "webhook" in error["loc"][:-1] else _Table if len(error["loc"]) == 1 else _Tenant
        return f"{key}: there is no such key, only {', '.join(known.model_fields)}"
    told = error["msg"].removeprefix("Value error, ")
    return f"{key}: {told[:1].lower()}{told[1:]}"
