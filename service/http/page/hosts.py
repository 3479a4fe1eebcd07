"""The hosts on the page, and orders about them: the calls of HostService."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from service.http.page.batches import NO_CONTEXT, as_json
from service.insight.host_servicer import HostServicer
from service.rpc import pages
from vllm_batch.v1 import host_service_pb2 as pb


class GivenHost(BaseModel):
    """Which host an order is about."""

    name: str


class GivenDrain(GivenHost):
    """An order to drain."""

    reason: str = ""


def router(servicer: HostServicer) -> APIRouter:
    """The page's operations on hosts."""
    made = APIRouter(prefix="/page/api/hosts", include_in_schema=False)

    @made.post("/drain", name="/page/DrainHost")
    async def drain(given: GivenDrain) -> dict[str, Any]:
        return as_json(await servicer.DrainHost(pb.DrainHostRequest(name=given.name, reason=given.reason), NO_CONTEXT))

    @made.post("/resume", name="/page/ResumeHost")
    async def resume(given: GivenHost) -> dict[str, Any]:
        return as_json(await servicer.ResumeHost(pb.ResumeHostRequest(name=given.name), NO_CONTEXT))

    @made.post("/forget", name="/page/ForgetHost")
    async def forget(given: GivenHost) -> dict[str, Any]:
        return as_json(await servicer.ForgetHost(pb.ForgetHostRequest(name=given.name), NO_CONTEXT))

    return made


async def read(servicer: HostServicer) -> dict[str, Any]:
    """The hosts as `vllm-batch hosts` has them. With a `next_page_token` there are more than one page holds."""
    return as_json(await servicer.ListHosts(pb.ListHostsRequest(page_size=pages.MAX_SIZE), NO_CONTEXT))
