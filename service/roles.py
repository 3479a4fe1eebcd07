"""Which role a call needs. Pure. A role may do what those before it may."""

from enum import StrEnum

import grpc

from service.errors import ApiError

ROLE_MISSING = "ROLE_MISSING"


class Role(StrEnum):
    """What the holder of a token may do, from least to most."""

    READ = "read"
    SUBMIT = "submit"
    OPERATE = "operate"


_BATCH = "/vllm_batch.v1.BatchService/"
_RECOVERY = "/vllm_batch.v1.RecoveryService/"

NEEDED = {
    _BATCH + "GetBatch": Role.READ,
    _BATCH + "ListBatches": Role.READ,
    _BATCH + "WatchBatch": Role.READ,
    _BATCH + "StreamResults": Role.READ,
    _BATCH + "GetResult": Role.READ,
    _BATCH + "CreateBatch": Role.SUBMIT,
    _BATCH + "UploadBatch": Role.SUBMIT,
    _BATCH + "CancelBatch": Role.SUBMIT,
    _BATCH + "DeleteBatch": Role.SUBMIT,
    _BATCH + "RetryBatch": Role.SUBMIT,
    _RECOVERY + "GetStatus": Role.READ,
    _RECOVERY + "ListEvents": Role.READ,
    _RECOVERY + "PauseRecovery": Role.OPERATE,
    _RECOVERY + "ResumeRecovery": Role.OPERATE,
    _RECOVERY + "ResetBudget": Role.OPERATE,
}


def is_open(method: str) -> bool:
    """True for health, which probes without a secret ask for."""
    return method.startswith("/grpc.health.v1.Health/")


def needed(method: str) -> Role:
    """The least role for a method, as `/package.Service/Method`. What is not known needs the highest."""
    if method.startswith("/grpc.reflection."):
        return Role.READ
    return NEEDED.get(method, Role.OPERATE)


def check(role: Role, method: str) -> None:
    """Raises PERMISSION_DENIED unless the role may call the method."""
    least, order = needed(method), list(Role)
    if order.index(role) < order.index(least):
        name = method.rpartition("/")[2]
        raise ApiError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"{name} needs a token with the role {least}; this one has {role}",
            ROLE_MISSING,
            {"role": role, "needed": least},
        )
