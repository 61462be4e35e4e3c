"""What the routes of one application share."""

from typing import NamedTuple

from fastapi import Request

from service.engine.metrics import Metrics
from service.engine.models import Models
from service.jobs.runner import Jobs
from service.settings import Settings


class AppState(NamedTuple):
    models: Models
    metrics: Metrics
    settings: Settings
    jobs: Jobs | None  # None on a server without a data directory


def state_of(request: Request) -> AppState:
    return request.app.state.shared
