"""The OpenAPI document, and the API held against it: generated requests, right and wrong, over real HTTP."""

from __future__ import annotations

import os
import re
import zlib
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
from server.resources import ALIAS_PATTERN, VERSION_PATTERN
from server.routes import router
from tests.support.engine import RECIPES, Bench, Site
from tests.support.http import serve_site

FIRST, SECOND, *_ = RECIPES
NUM_EXAMPLES = int(os.environ.get("API_EXAMPLES", "20"))  # for each operation and each kind of data


def _document() -> dict[str, Any]:
    app = FastAPI()
    app.include_router(router)
    describe_api(app)
    return app.openapi()


DOCUMENT = _document()
# Rules that a schema can't tell: what a message of each role holds, weights that add up to 100, the content of files.
_MAY_REFUSE = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/route",
    "GET /v1/experiments",
    "POST /v1/experiments",
    "POST /v1/experiments/{experiment}/weights",
    "POST /v1/adapters",
    "GET /v1/files",
    "POST /v1/files",
    "GET /v1/fine_tuning/jobs",
    "POST /v1/fine_tuning/jobs",
)
_REFUSALS = {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404, 409, 429]}}
_REFUSED = ["400", "401", "403", "404", "405", "409", "413", "415", "428", "429"]  # its own list lacks 413 and 415
SCHEMA = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=SchemathesisConfig.from_dict(
        {
            "generation": {"deterministic": True},
            "output": {"sanitization": {"enabled": False}},  # it takes max_tokens for a secret
            "checks": {"negative_data_rejection": {"expected-statuses": _REFUSED}},
            "operations": [{"include-name": name, "checks": _REFUSALS} for name in _MAY_REFUSE],
        }
    ),
)


# A generated name seldom is one that exists: of those that could be, half are taken for one that does.
_KNOWN = {"alias": "legal", "model": "legal", "name": "legal", "version": "v1"}
_PATTERNS = {"alias": ALIAS_PATTERN, "model": ALIAS_PATTERN, "name": ALIAS_PATTERN, "version": VERSION_PATTERN}


@SCHEMA.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Any) -> Any:
    """Called by schemathesis for the variable parts of a path, None if it has none."""
    return _with_known(path_parameters)


@SCHEMA.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Called by schemathesis for a body."""
    return _with_known(body)


def _with_known(values: Any) -> Any:
    return {name: _known(name, value) for name, value in values.items()} if isinstance(values, dict) else values


def _known(name: str, value: Any) -> Any:
    """What is wrong stays as it is: a request that has to be refused must not become right."""
    fits = name in _PATTERNS and isinstance(value, str) and re.fullmatch(_PATTERNS[name], value) is not None
    return _KNOWN[name] if fits and zlib.crc32(value.encode()) % 2 else value


@pytest.fixture(scope="module")
def live(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, str]]:
    """A live site and its URL."""
    home = tmp_path_factory.mktemp("site")
    with closing(open_database(f"sqlite:///{home / 'hotswap.db'}")) as database:
        site = Site.build(bench, Registry(database, ArtifactStore(home / "store")), home)
        with serve_site(site) as served:
            yield site, served.root
        site.engine.close()


@pytest.fixture
def url(live: tuple[Site, str]) -> str:
    """A live site with two versions of `legal` and no experiment, whatever the operations before have done to it."""
    site, address = live
    for experiment in site.experiments.list():
        if experiment.state in ("draft", "running"):
            site.experiments.stop(experiment.id)
    for recipe in (FIRST, SECOND):
        site.publish("legal", recipe)
    return address


@SCHEMA.parametrize()
@settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
        name
        for name in ("ExperimentRequest", "HoldoutRequest", "PinRequest", "PromoteRequest", "WeightsRequest")
        if not schemas[name]["examples"]
    ] == []
