"""`/metrics` in the one format that keeps the names as they are."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, CollectorRegistry, generate_latest


def scrape_router(registry: CollectorRegistry = REGISTRY) -> APIRouter:
    """Offer a registry in Prometheus' text format.

    The SDK's own route agrees with Prometheus on OpenMetrics, in which prometheus-client writes `_` for the colon:
    `nvila:num_requests_running` would arrive under a name that no dashboard and no alert asks for.
    """
    router = APIRouter()

    @router.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
