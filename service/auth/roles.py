"""The role that each call requires. Pure. A role includes those before it."""

from enum import StrEnum

import grpc

from service.errors import ApiError

ROLE_MISSING = "ROLE_MISSING"


class Role(StrEnum):
    """What a token's holder may do, from least to most."""

    READ = "read"
    SUBMIT = "submit"
    OPERATE = "operate"


_BATCH = "/vllm_batch.v1.BatchService/"
_WEBHOOK = "/vllm_batch.v1.WebhookService/"
_RECOVERY = "/vllm_batch.v1.RecoveryService/"
_HOST = "/vllm_batch.v1.HostService/"
# Calls over HTTP, by what OpenAI's API calls them.
_OPENAI = "/openai/"
# Calls of the page.
_PAGE = "/page/"

NEEDED = {
    _BATCH + "GetBatch": Role.READ,
    _BATCH + "ListBatches": Role.READ,
    _BATCH + "WatchBatch": Role.READ,
    _BATCH + "StreamResults": Role.READ,
    _BATCH + "ListErrors": Role.READ,
    _BATCH + "GetResult": Role.READ,
    _BATCH + "GetServiceStatus": Role.READ,
    _BATCH + "ListTenants": Role.READ,
    _BATCH + "CreateBatch": Role.SUBMIT,
    _BATCH + "UploadBatch": Role.SUBMIT,
    _BATCH + "CancelBatch": Role.SUBMIT,
    _BATCH + "DeleteBatch": Role.SUBMIT,
    _BATCH + "RetryBatch": Role.SUBMIT,
    _WEBHOOK + "ListDeliveries": Role.READ,
    _WEBHOOK + "TestWebhook": Role.SUBMIT,
    _WEBHOOK + "ReplayDeliveries": Role.SUBMIT,
    _OPENAI + "ListFiles": Role.READ,
    _OPENAI + "GetFile": Role.READ,
    _OPENAI + "GetFileContent": Role.READ,
    _OPENAI + "ListBatches": Role.READ,
    _OPENAI + "GetBatch": Role.READ,
    _OPENAI + "ListModels": Role.READ,
    _OPENAI + "GetModel": Role.READ,
    _OPENAI + "CreateFile": Role.SUBMIT,
    _OPENAI + "DeleteFile": Role.SUBMIT,
    _OPENAI + "CreateBatch": Role.SUBMIT,
    _OPENAI + "CancelBatch": Role.SUBMIT,
    _OPENAI + "CreateUpload": Role.SUBMIT,
    _OPENAI + "AddUploadPart": Role.SUBMIT,
    _OPENAI + "CompleteUpload": Role.SUBMIT,
    _OPENAI + "CancelUpload": Role.SUBMIT,
    _PAGE + "GetSession": Role.READ,
    _PAGE + "SignOut": Role.READ,
    _PAGE + "Follow": Role.READ,
    _PAGE + "GetLines": Role.READ,
    _PAGE + "ListErrors": Role.READ,
    _PAGE + "ListResults": Role.READ,
    _PAGE + "GetRequest": Role.READ,
    _PAGE + "GetOutput": Role.READ,
    _PAGE + "GetSignals": Role.READ,
    _PAGE + "ListEvents": Role.READ,
    _PAGE + "CancelBatch": Role.SUBMIT,
    _PAGE + "DeleteBatch": Role.SUBMIT,
    _PAGE + "RetryBatch": Role.SUBMIT,
    _PAGE + "OrderRecovery": Role.OPERATE,
    _PAGE + "DrainHost": Role.OPERATE,
    _PAGE + "ResumeHost": Role.OPERATE,
    _PAGE + "ForgetHost": Role.OPERATE,
    _RECOVERY + "GetStatus": Role.READ,
    _RECOVERY + "ListEvents": Role.READ,
    _RECOVERY + "PauseRecovery": Role.OPERATE,
    _RECOVERY + "ResumeRecovery": Role.OPERATE,
    _RECOVERY + "ResetBudget": Role.OPERATE,
    _HOST + "ListHosts": Role.OPERATE,
    _HOST + "DrainHost": Role.OPERATE,
    _HOST + "ResumeHost": Role.OPERATE,
    _HOST + "ForgetHost": Role.OPERATE,
}


def is_open(method: str) -> bool:
    """True for health checks: probes have no token."""
    return method.startswith("/grpc.health.v1.Health/")


def needed(method: str) -> Role:
    """The lowest role that may call `/package.Service/Method`. Unknown methods require the highest."""
    if method.startswith("/grpc.reflection."):
        return Role.READ
    return NEEDED.get(method, Role.OPERATE)


def check(role: Role, method: str) -> None:
    """Raises PERMISSION_DENIED unless the role may call the method."""
    least, order = needed(method), list(Role)
    if order.index(role) < order.index(least):
        raise missing(method.rpartition("/")[2], role, least)


def missing(what: str, role: Role, least: Role) -> ApiError:
    """PERMISSION_DENIED: `what` requires a higher role than the caller's."""
    return ApiError(
        grpc.StatusCode.PERMISSION_DENIED,
        f"{what} requires a token with the role {least}; this one has {role}",
        ROLE_MISSING,
        {"role": role, "needed": least},
    )
