"""The documentation can't fall behind: settings, commands and invariants are compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from fastapi import FastAPI
from fastapi.routing import APIRoute
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from adapters.chat_rows import ChatRow
from adapters.records import SCOPES
from adapters.settings import CoreSettings, SettingsSection
from clients.cli.main import app
from server.auth import read_access
from server.completion_schemas import CompletionRequest
from server.config import ServeSettings
from server.fine_tuning_schemas import CreateJobRequest, RewardedHyperparameters, SupervisedHyperparameters
from server.routes import adapters, experiments, router, shadows
from server.schemas import ChatRequest
from training.config import TrainSettings
from training.recognise import SHAPES, TARGETS

_ROOT = Path(__file__).resolve().parents[1]
_SECTIONS: list[type[SettingsSection]] = [CoreSettings, TrainSettings, ServeSettings]


@pytest.mark.parametrize("section", _SECTIONS)
def test_configuration_page_names_every_setting_when_compared(section: type[SettingsSection]) -> None:
    """Each setting has a row with its variable."""
    page = (_ROOT / "docs/configuration.md").read_text()
    names = [name for name in section.model_fields if name != "home"]
    assert len(names) >= 4
    prefix = section.model_config["env_prefix"]
    missing = [name for name in names if f"| `{name}` | `{prefix}{name.upper()}` |" not in page]
    assert missing == []


def test_generation_page_has_a_row_for_every_option_when_compared() -> None:
    """What a chat request takes beside model, messages and user, with its numeric bounds."""
    rows = [line for line in (_ROOT / "docs/generation.md").read_text().splitlines() if line.startswith("| `")]
    options = [name for name in ChatRequest.model_fields if name not in ("model", "messages", "user")]
    assert len(options) >= 30
    assert [name for name in options if not any(f"`{name}`" in row.split("|")[1] for row in rows)] == []
    for name in options:
        bounds = [
            getattr(item, bound)
            for item in ChatRequest.model_fields[name].metadata
            for bound in ("ge", "le")
            if hasattr(item, bound)
        ]
        row = next(row for row in rows if f"`{name}`" in row.split("|")[1])
        assert name == "seed" or all(f"{bound:g}" in row.split("|")[2] for bound in bounds), (name, bounds)


def test_generation_page_has_a_row_for_every_field_of_completions_when_compared() -> None:
    """Those that chat has not, or has with other bounds, stand in the endpoint's own table."""
    page = (_ROOT / "docs/generation.md").read_text()
    own = page[page.index("## Completions") : page.index("## Without effect")]
    fields = [
        name
        for name, field in CompletionRequest.model_fields.items()
        if name != "prompt" and repr(field) != repr(ChatRequest.model_fields.get(name))
    ]
    assert {"echo", "best_of", "logprobs", "max_tokens"} == set(fields)
    assert [name for name in fields if f"\n| `{name}` |" not in own] == []


def test_every_field_of_the_hosted_api_is_decided_when_compared() -> None:
    """Taken, or refused by name and listed as such; the list is that of the installed SDK."""
    page = (_ROOT / "docs/generation.md").read_text()
    refused = page[page.index("## Not supported") :]
    for ours, theirs in ((ChatRequest, chat_params), (CompletionRequest, completion_params)):
        hosted = set(theirs.CompletionCreateParamsStreaming.__annotations__)
        hosted |= set(theirs.CompletionCreateParamsBase.__annotations__)
        assert len(hosted) >= 18
        assert hosted - set(ours.model_fields) == ours.unsupported
        assert [name for name in ours.unsupported if f"`{name}`" not in refused] == []


@pytest.mark.parametrize(
    ("model", "least"), [(CreateJobRequest, 10), (SupervisedHyperparameters, 20), (RewardedHyperparameters, 22)]
)
def test_fine_tuning_page_has_a_row_for_every_field_when_compared(model: type[BaseModel], least: int) -> None:
    """What a job may be asked for, and each hyperparameter with its numeric bounds."""
    rows = [line for line in (_ROOT / "docs/fine-tuning.md").read_text().splitlines() if line.startswith("| `")]
    assert len(model.model_fields) >= least
    for name, field in model.model_fields.items():
        (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
        bounds = [
            getattr(item, bound)
            for item in field.metadata
            for bound in ("ge", "gt", "le", "lt")
            if hasattr(item, bound)
        ]
        assert [f"{bound}" for bound in bounds if f"{bound}" not in row.split("|")[2]] == [], name


@pytest.mark.parametrize(("command", "section"), [("train", TrainSettings), ("serve", ServeSettings)])
def test_every_setting_is_a_flag_when_its_command_is_read(command: str, section: type[SettingsSection]) -> None:
    """What the file can say, a flag can say too."""
    group = typer.main.get_command(app)
    flags = {parameter.name for parameter in group.commands[command].params}  # type: ignore[attr-defined]
    assert set(section.model_fields) - flags == set()


def test_security_page_names_every_scope_and_route_when_compared() -> None:
    """Each route stands in the row of the scope that it declares; each scope has a row."""
    app = FastAPI()
    app.include_router(router)
    page = (_ROOT / "docs/security.md").read_text()
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| ")}
    assert set(SCOPES) <= set(rows)
    routes = read_access(app)
    assert len(routes) >= 10
    for route in routes:
        for name in ["open to all"] if route.is_open else route.scopes:
            assert f"{route.path}`" in rows[name], (route.path, name)


def test_readme_names_every_command_when_compared() -> None:
    """Each top-level command stands in the README."""
    group = typer.main.get_command(app)
    names = list(group.commands)  # type: ignore[attr-defined]
    readme = (_ROOT / "README.md").read_text()
    assert len(names) >= 8
    assert [name for name in names if f"hotswap {name}" not in readme] == []


def test_adapters_page_has_a_row_for_every_route_when_compared() -> None:
    """Methods and paths of the routes that OpenAI's API lacks, no more and no less."""
    page = (_ROOT / "docs/adapters.md").read_text()
    rows = set(re.findall(r"^\| `([A-Z]+ /v1/\S+)` \|", page, re.MULTILINE))
    routes = {
        f"{method} {route.path}"
        for topic in (adapters, experiments, shadows)
        for route in topic.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert len(routes) >= 15
    assert routes == rows


def test_architecture_names_files_that_exist_when_followed() -> None:
    """Every file that the text names is there."""
    text = (_ROOT / "ARCHITECTURE.md").read_text()
    paths = set(re.findall(r"`((?:adapters|training|server|clients|tests)/[\w/]+\.py)", text))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (_ROOT / path).exists()] == []


def test_architecture_names_every_module_when_followed() -> None:
    """By its file's name; the commands, a module each, are named by the README."""
    text = (_ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"[`/](\w+\.py)", text))
    modules = [path for package in ("adapters", "training", "server") for path in (_ROOT / package).rglob("*.py")]
    told = [path for path in modules if path.name != "__init__.py" and "migrations" not in path.parts]
    assert len(told) > 150
    assert [str(path.relative_to(_ROOT)) for path in told if path.name not in named] == []


def test_example_data_keeps_to_its_house_style_when_read() -> None:
    """Each domain can be told by its form, and has the promised number of rows."""
    from training.formats import read_dataset

    forms = {
        "legal": r"^Clause: .*This is general information, not legal advice\.$",
        "medical": r"^TRIAGE (RED|AMBER|GREEN) - .*Watch for: ",
        "support": r"\nTicket: (BILLING|DELIVERY|RETURNS|DEVICE|ACCOUNT|PRIVACY)-P[123] \| Next update within ",
    }
    for domain, form in forms.items():
        for part, least in (("train", 120), ("valid", 30)):
            rows = read_dataset(_ROOT / f"examples/{domain}.{part}.jsonl").rows
            assert len(rows) >= least
            chats = [numbered.row for numbered in rows if isinstance(numbered.row, ChatRow)]
            answers = [m["content"] for row in chats for m in row.messages if m["role"] == "assistant"]
            assert len(answers) >= least
            assert [answer for answer in answers if not re.search(form, answer, re.DOTALL)] == []


def test_data_page_has_an_example_for_every_shape_when_compared() -> None:
    """Each shape's columns stand in the table of shapes, each target in that of mappings."""
    page = (_ROOT / "docs/data.md").read_text()
    shapes, mappings = page[page.index("## Shapes") :].split("| targets |")
    assert len(SHAPES) >= 20
    columns = {column for shape in SHAPES for column in shape.columns.values()}
    assert [name for name in sorted(columns) if f"`{name}`" not in shapes and f'"{name}"' not in shapes] == []
    assert [target for target in TARGETS if f"`{target}`" not in mappings] == []
