"""Who makes a call, and whose batches that caller may see. Pure."""

from dataclasses import dataclass

from service.auth.roles import Role
from service.tenants import DEFAULT_TENANT


@dataclass(frozen=True)
class Caller:
    """Who makes a call. `name` is that of its token or certificate; empty if none is required."""

    name: str
    tenant: str
    role: Role

    @property
    def sees_all(self) -> bool:
        """True if it may see and change the batches of all tenants."""
        return self.role is Role.OPERATE

    @property
    def scope(self) -> str | None:
        """The tenant to whose batches its calls are limited; None: all tenants'."""
        return None if self.sees_all else self.tenant


# Without tokens.
ANYBODY = Caller("", DEFAULT_TENANT, Role.OPERATE)
# Until a caller is known: sees nothing.
NOBODY = Caller("", "", Role.READ)
