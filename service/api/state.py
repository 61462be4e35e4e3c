"""What the routes of one application share."""

from typing import NamedTuple

from fastapi import Request
from prometheus_client import CollectorRegistry

from service.api.metrics_alias import VllmNames
from service.engine.metrics import Metrics
from service.engine.models import Models
from service.jobs.runner import Jobs
from service.settings import Settings


class AppState(NamedTuple):
    models: Models
    metrics: Metrics
    settings: Settings
    jobs: Jobs | None  # None on a server without a data directory

    @property
    def exported(self) -> CollectorRegistry | VllmNames:
        """What /metrics shows."""
        registry = self.metrics.registry
        return VllmNames(registry) if self.settings.metrics_alias == "vllm" else registry


def state_of(request: Request) -> AppState:
    return request.app.state.shared
