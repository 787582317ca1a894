"""What a route may use, joined once per API process by `app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from adapters.experiments import ExperimentService
from adapters.files import FileService
from adapters.registry import Registry
from server.chat import ChatService
from server.engine_client import EngineClient
from server.fine_tuning import FineTuningService
from server.metrics import Metrics

__all__ = ["CurrentServices", "Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running API process."""

    registry: Registry
    experiments: ExperimentService
    engine: EngineClient
    chat: ChatService
    metrics: Metrics
    files: FileService
    fine_tuning: FineTuningService


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


CurrentServices = Annotated[Services, Depends(_services)]
