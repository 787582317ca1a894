"""What a route may use, joined once per API process by `app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from adapters.experiments import ExperimentService
from adapters.registry import Registry
from server.chat import ChatService
from server.engine_client import EngineClient
from server.metrics import Metrics
from server.pins import PinKeeper
from server.uploads import AdapterUploads

__all__ = ["CurrentServices", "Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running API process."""

    registry: Registry
    experiments: ExperimentService
    engine: EngineClient
    chat: ChatService
    metrics: Metrics
    pins: PinKeeper
    uploads: AdapterUploads


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


CurrentServices = Annotated[Services, Depends(_services)]
