"""`hotswap experiments`: split an alias between versions, change and end that.

What comes of one is printed by `experiment_report`, what one takes by `experiment_power`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.experiment_acts import accept, promote, rollback
from clients.cli.experiment_power import power
from clients.cli.experiment_report import show
from clients.cli.options import HomeOption, JsonOption, open_registry
from clients.cli.output import console, format_moment, print_json, print_table

if TYPE_CHECKING:
    from adapters.experiment_config import ExperimentConfig
    from adapters.experiments import ExperimentService
    from adapters.records import Experiment, ExperimentState

__all__ = ["app"]

app = typer.Typer(help="Experiments: split an alias between versions, read the verdict.", no_args_is_help=True)
app.command("show")(show)
app.command("power")(power)
app.command("promote")(promote)
app.command("rollback")(rollback)
app.command("accept")(accept)
_NameArgument = Annotated[str, typer.Argument(help="An experiment's id, or its alias.")]


@app.command("create")
def create(
    alias: Annotated[str | None, typer.Argument(help="The alias to split.", show_default="the file's")] = None,
    more_arms: Annotated[list[str] | None, typer.Argument(metavar="[ARM]...", help="Further arms.")] = None,
    arms: Annotated[list[str] | None, typer.Option("--arms", help="NAME@VERSION=PERCENT, two or more.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file with the whole experiment: metric, guardrails, times.")
    ] = None,
    draft: Annotated[bool, typer.Option("--draft", help="Only write it down; `start` starts it.")] = False,
    salt: Annotated[str | None, typer.Option(help="Decides who gets which arm; default: random.")] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Split an alias: hotswap experiments create support --arms A@v1=50 B@v2=50."""
    from adapters.errors import InvalidInputError
    from adapters.experiment_config import notes_on, parse_arm

    listed = [*(arms or []), *(more_arms or [])]
    if config is not None:
        if listed or alias is not None or salt is not None:
            raise InvalidInputError("--config says all of the experiment; give it alone", param="config")
        experiment = _create_from_file(_open(home), config, draft=draft)
    elif alias is None or not listed:
        raise InvalidInputError("expected an alias and --arms, or --config FILE", param="arms")
    else:
        experiment = _open(home).create(alias, [parse_arm(arm) for arm in listed], salt=salt, draft=draft)
    _tell(experiment, "\n".join([_describe_start(experiment, draft=draft), *notes_on(experiment)]), json=json)


@app.command("list")
def list_experiments(
    state: Annotated[str | None, typer.Option(help="Only drafts, or those running, stopped, decided.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """The newest experiments."""
    found = _open(home).list(state=_read_state(state), limit=limit)
    if json:
        print_json(found)
        return
    rows = [(item.id, item.state, format_moment(item.created_at), _describe_arms(item)) for item in found]
    print_table(["experiment", "state", "created", "arms"], rows, whole=["experiment", "created"])


@app.command("start")
def start(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Start a draft: at once, or at its time if that lies ahead."""
    experiment = _open(home).start(name)
    _tell(experiment, _describe_start(experiment, draft=False), json=json)


@app.command("weights")
def change_weights(
    name: _NameArgument,
    weights: Annotated[
        list[str], typer.Argument(metavar="WEIGHT...", help="NAME=PERCENT of every arm; NAME@VERSION=PERCENT adds one.")
    ],
    traffic: Annotated[
        float | None, typer.Option(help="Percent of the alias's users in the experiment.", show_default="as it is")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the log.")] = "weights were changed",
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Change the weights of a running experiment: hotswap experiments weights support A=90 B=10.

    A new stage begins: the verdict counts anew, without what users did so far, which undo does not bring back.
    """
    from adapters.experiment_config import parse_weight

    arms = [parse_weight(weight) for weight in weights]
    service = _open(home)
    experiment = service.change_weights(name, arms, traffic=traffic, reason=reason)
    words = f"{experiment.id} is in stage {experiment.stage}: {_describe_arms(experiment)}"
    _tell(experiment, f"{words}\n{service.note_on_stage(experiment)}", json=json)


@app.command("undo")
def undo(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Take the latest change of weights, promotion, rollback, acceptance or stop back that isn't yet.

    After a change of weights or a stop a new stage begins: the verdict counts anew, without what users did so far.
    """
    from adapters.experiment_acts import undo as undo_act

    service = _open(home)
    experiment = undo_act(open_registry(home), name)
    decision = service.decisions(experiment.id)[-1]
    words = f"{experiment.id} is {experiment.state}: {decision.reason}"
    if "from_stage" in decision.numbers:
        words += f"; this is stage {experiment.stage}\n{service.note_on_stage(experiment)}"
    _tell(experiment, words, json=json)


@app.command("log")
def show_log(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """What was done to an experiment, by whom and why, the oldest first."""
    decisions = _open(home).decisions(name)
    if json:
        print_json(decisions)
        return
    rows = [(format_moment(item.made_at), item.stage, item.action, item.by, item.reason) for item in decisions]
    print_table(["when", "stage", "act", "by", "why"], rows, whole=["when", "act"])


@app.command("holdout")
def holdout(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    percent: Annotated[
        float | None, typer.Argument(help="Percent of its users; 0 is none.", show_default="ask")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show, or set, the percent of an alias's users that no experiment touches."""
    service = _open(home)
    if percent is not None:
        service.set_holdout(alias, percent)
    present = service.holdout(alias)
    if json:
        print_json({"alias": alias, "percent": present})
    else:
        console.print(f"{present:g} % of the users of {alias} are in no experiment", soft_wrap=True)


@app.command("stop")
def stop(name: _NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """End an experiment; its alias answers with the version that it points to."""
    experiment = _open(home).stop(name)
    _tell(experiment, f"{experiment.id} is stopped; {experiment.alias} answers with one version again", json=json)


def _create_from_file(service: ExperimentService, path: Path, *, draft: bool) -> Experiment:
    asked = _read_file(path)
    return service.create(
        asked.alias,
        asked.arm_tuples(),
        salt=asked.salt,
        traffic=asked.traffic,
        starts_at=asked.starts_at,
        ends_at=asked.ends_at,
        plan=asked.plan(),
        draft=draft,
    )


def _read_file(path: Path) -> ExperimentConfig:
    import yaml
    from pydantic import ValidationError

    from adapters.errors import InvalidInputError
    from adapters.experiment_config import ExperimentConfig

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ExperimentConfig.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: "
            f"{_unknown_key(item['loc']) if item['type'] == 'extra_forbidden' else item['msg']}"
            for item in error.errors()
        ]
        raise InvalidInputError(f"{path}: {'; '.join(problems)}", param="config") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInputError(f"{path}: {error}", param="config") from None


def _unknown_key(place: tuple[int | str, ...]) -> str:
    """What is said of a field that there is none of: those that there are at its place."""
    from pydantic import BaseModel

    from adapters.experiment_config import ArmConfig, ExperimentConfig, GuardrailConfig, MetricConfig

    parts: dict[str, type[BaseModel]] = {"arms": ArmConfig, "metric": MetricConfig, "guardrails": GuardrailConfig}
    found: type[BaseModel] = ExperimentConfig if len(place) == 1 else parts[str(place[0])]
    return f"no such field; there are {', '.join(found.model_fields)}"


def _read_state(text: str | None) -> ExperimentState | None:
    from adapters.errors import InvalidInputError
    from adapters.records import EXPERIMENT_STATES

    found = next((state for state in EXPERIMENT_STATES if state == text), None)
    if text is not None and found is None:
        raise InvalidInputError(f"state: expected one of {', '.join(EXPERIMENT_STATES)}, found {text!r}", param="state")
    return found


def _tell(experiment: Experiment, words: str, *, json: bool) -> None:
    if json:
        print_json(experiment)
    else:
        console.print(words, soft_wrap=True)


def _describe_start(experiment: Experiment, *, draft: bool) -> str:
    arms = _describe_arms(experiment)
    share = "" if experiment.traffic == 100 else f" for {experiment.traffic:g} % of the users"
    if draft:
        return f"{experiment.id} is a draft; start it with: hotswap experiments start {experiment.id}"
    if experiment.state == "draft":
        assert experiment.starts_at is not None, "it was started"
        return f"{experiment.id} starts on {experiment.alias} at {format_moment(experiment.starts_at)}{share}: {arms}"
    return f"{experiment.id} runs on {experiment.alias}{share}: {arms}"


def _open(home: Path | None) -> ExperimentService:
    from adapters.experiments import ExperimentService

    return ExperimentService(open_registry(home).database)


def _describe_arms(experiment: Experiment) -> str:
    return ", ".join(f"{arm.name} = {experiment.alias}@v{arm.number} ({arm.weight:g} %)" for arm in experiment.arms)
