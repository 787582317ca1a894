"""What a route may use, joined once per API process by `app`, on behalf of whoever calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Request

from adapters.experiment_evaluation import ExperimentEvaluation
from adapters.experiments import ExperimentService
from adapters.files import FileService
from adapters.keys import KeyService
from adapters.registry import Registry
from adapters.routing.service import RoutingService
from adapters.shadows import ShadowService
from server.auth import caller_of
from server.callers import Caller
from server.chat import ChatService
from server.conversations import ConversationKeeper
from server.engine_client import EngineClient
from server.fine_tuning import FineTuningService
from server.metrics import Metrics
from server.observe import request_id_of
from server.pins import PinKeeper
from server.shadows import ShadowKeeper
from server.uploads import Uploads

__all__ = ["CurrentCaller", "CurrentServices", "Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running API process."""

    registry: Registry
    experiments: ExperimentService
    evaluation: ExperimentEvaluation
    engine: EngineClient
    chat: ChatService
    conversations: ConversationKeeper
    shadows: ShadowService
    shadow_keeper: ShadowKeeper
    metrics: Metrics
    keys: KeyService
    pins: PinKeeper
    uploads: Uploads
    files: FileService
    fine_tuning: FineTuningService
    routing: RoutingService
    base_name: str  # the base model's own, beside `base`


CurrentCaller = Annotated[Caller, Depends(caller_of)]


def _services(request: Request, caller: CurrentCaller) -> Services:
    """The parts, acting for the caller: aliases that its key may not use don't exist, and its acts bear its name."""
    services: Services = request.app.state.services
    actor = caller.actor(request_id_of(request.scope))
    return replace(
        services,
        registry=services.registry.acting_for(actor),
        experiments=services.experiments.acting_for(actor),
        shadows=services.shadows.acting_for(actor),
        evaluation=services.evaluation.acting_for(actor),
        files=services.files.acting_for(actor),
        fine_tuning=services.fine_tuning.acting_for(actor),
        routing=services.routing.acting_for(actor),
    )


CurrentServices = Annotated[Services, Depends(_services)]
