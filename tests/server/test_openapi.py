"""The OpenAPI document, and the API held against it: generated requests, right and wrong, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from adapters.database import open_database
from adapters.registry import Registry
from adapters.store import ArtifactStore
from server.openapi import describe_api
from server.routes import router
from tests.support.engine import RECIPES, Bench, Site
from tests.support.live import serving

FIRST, SECOND, *_ = RECIPES


def _document() -> dict[str, Any]:
    app = FastAPI()
    app.include_router(router)
    describe_api(app)
    return app.openapi()


DOCUMENT = _document()
# Rules that a schema can't tell: weights that add up to 100, answers that differ, the content of files.
_MAY_REFUSE = ("POST /v1/chat/completions", "POST /v1/experiments", "POST /v1/adapters")
_REFUSALS = {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404, 409, 429]}}
SCHEMA = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=SchemathesisConfig.from_dict(
        {
            "generation": {"deterministic": True},
            "operations": [{"include-name": name, "checks": _REFUSALS} for name in _MAY_REFUSE],
        }
    ),
)


@pytest.fixture(scope="module")
def url(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A live site with `legal` in two versions. Requests of all kinds change it, as they may."""
    home = tmp_path_factory.mktemp("site")
    with closing(open_database(f"sqlite:///{home / 'hotswap.db'}")) as database:
        site = Site.build(bench, Registry(database, ArtifactStore(home / "store")), home)
        site.publish("legal", FIRST)
        site.publish("legal", SECOND)
        with serving(site) as address:
            yield address
        site.engine.close()


@SCHEMA.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_api_keeps_to_its_document_when_asked_anything(case: schemathesis.Case[Any], url: str) -> None:
    """What fits the document is answered as it says, what does not is refused, and nothing fails in the server."""
    case.call_and_validate(base_url=url)


def test_document_tells_of_every_operation_when_read() -> None:
    """A summary, a description, a tag, errors in the envelope, none of FastAPI's own."""
    operations = [operation for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert len(operations) >= 25
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]
        assert 1 == len(operation["tags"])
        error = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert {"$ref": "#/components/schemas/Error"} == error
        assert "422" not in operation["responses"]
    assert ("Hotswap", "0.1.0") == (DOCUMENT["info"]["title"], DOCUMENT["info"]["version"])


def test_document_has_an_example_for_every_body_of_ours_when_read() -> None:
    """Routes that OpenAI's API lacks: somebody has to see once how a body looks."""
    schemas = DOCUMENT["components"]["schemas"]
    assert [
        name for name in ("ExperimentRequest", "PinRequest", "PromoteRequest") if not schemas[name]["examples"]
    ] == []
