"""Watching a share of the requests for drift, from inside the server: counts of bins, nothing of any request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from nvila_platform.drift.features import answer_features, request_features
from nvila_platform.drift.watch import DriftWatch

if TYPE_CHECKING:
    from PIL import Image
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from nvila.data.records import Message
    from nvila_platform.serving.media import Medium
    from nvila_platform.serving.stream import Stream


class TrafficWatch:
    """Describes chosen requests and their answers to a `DriftWatch`.

    Args:
        watch: What counts.
    """

    def __init__(self, watch: DriftWatch) -> None:
        self.watch = watch

    async def see(self, messages: Sequence[Message], media: Mapping[str, Medium], streams: Iterable[Stream]) -> None:
        """Look at a request, if chance wants it; its answers are counted when they end.

        Args:
            messages: The conversation.
            media: Its decoded images and videos.
            streams: Its answers, before anything of them was read.
        """
        if not self.watch.chosen():
            return
        prompt = "\n".join(message.text for message in messages if message.role == "user")
        # In a thread: a large image takes milliseconds, in which no other answer could be sent.
        values = await asyncio.to_thread(request_features, prompt, list(_pictures(media.values())))
        self.watch.add(values)
        for stream in streams:
            stream.on_end = self._answered

    def _answered(self, letters: int) -> None:
        self.watch.add(answer_features(letters), request=False)


def _pictures(media: Iterable[Medium]) -> Iterator[Image.Image]:
    """Yield the images, and of every video its first frame."""
    from PIL import Image

    for medium in media:
        if isinstance(medium, Image.Image):
            yield medium
        else:
            yield Image.fromarray(medium.frames[0])


def drift_router(watch: DriftWatch) -> APIRouter:
    """Offer the counts at `/drift`, which `nvila drift report` reads."""
    router = APIRouter()

    @router.get("/drift", include_in_schema=False)
    def drift() -> Response:
        return JSONResponse(watch.to_dict())

    return router


class DriftCollector:
    """Tells Prometheus how far each feature has moved.

    Args:
        name: Of the served model; labels every series.
        watch: What counts.
    """

    def __init__(self, name: str, watch: DriftWatch) -> None:
        self._name = name
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment; a feature of which too little was seen has no index."""
        from prometheus_client.core import GaugeMetricFamily

        labels = ["model_name", "feature"]
        index = GaugeMetricFamily("nvila:drift_psi", "Population stability index against the reference.", labels=labels)
        values = GaugeMetricFamily("nvila:drift_values", "Values in the window of a feature.", labels=labels)
        for drift in self._watch.drifts():
            values.add_metric([self._name, drift.feature], drift.seen)
            if drift.psi is not None:
                index.add_metric([self._name, drift.feature], drift.psi)
        yield index
        yield values


def register_drift(name: str, watch: DriftWatch, registry: CollectorRegistry) -> None:
    """Offer the figures of a watch."""
    registry.register(DriftCollector(name, watch))
