"""`hotswap route`: where a request for `auto` would go and why; the router's rules, history and quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from clients.cli.options import BaseOption, HomeOption, JsonOption, load_core, open_registry
from clients.cli.output import console, format_moment, print_json, print_table

if TYPE_CHECKING:
    from adapters.chat_rows import Row
    from adapters.registry import Registry
    from adapters.routing.evaluation import Evaluation, Predictor
    from adapters.routing.service import Decision, NearPrompt, RoutingService

__all__ = ["app", "warn_unknown_to_router"]


class _RouteGroup(TyperGroup):
    """Takes anything but the name of a command for the text to explain: hotswap route "my landlord ..."."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name, else `explain` with all of them."""
        given = args if args[0] in self.commands else ["explain", *args]
        return super().resolve_command(ctx, given)


app = typer.Typer(
    help="The router of model auto: explain, evaluate, history, rules.", no_args_is_help=True, cls=_RouteGroup
)


@app.command("explain")
def explain(
    text: Annotated[str, typer.Argument(help="What a user says.")],
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="The request's; may be repeated.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="The id of the API key: key-1f2e3d4c5b6a.")] = None,
    home: HomeOption = None,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Say where a request would go, and why; `explain` may be left out: hotswap route "Where is my order?"."""
    service = _open(home, base)
    decision = service.route([text], metadata=_parse_metadata(metadata or []), key=key)
    near = service.nearest(text)
    if json:
        print_json({"decision": decision, "nearest": near})
    else:
        _print_decision(decision, near)


@app.command("evaluate")
def evaluate(
    file: Annotated[Path, typer.Argument(help='JSON lines: {"text": ..., "alias": ... or null, "paraphrase": ...}.')],
    train: Annotated[
        Path | None,
        typer.Option("--train", help="Measure a router trained from this file of such lines, not the present one."),
    ] = None,
    home: HomeOption = None,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Measure the router on texts whose alias is known; null is a text that belongs nowhere."""
    from adapters.errors import InvalidInputError
    from adapters.routing.evaluation import evaluate as measure
    from adapters.routing.prompts import read_labelled

    rows = read_labelled(file)
    predict, aliases, threshold = _predictor(train, home, base)
    try:
        result = measure(
            predict,
            aliases,
            [row["text"] for row in rows],
            [row["alias"] for row in rows],
            [row.get("paraphrase") for row in rows],
            threshold=threshold,
        )
    except ValueError as error:
        raise InvalidInputError(f"{file}: {error}: {', '.join(sorted(aliases))}") from None
    if json:
        print_json(result)
    else:
        _print_evaluation(result, threshold)


@app.command("history")
def history(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """The latest routers and what each was trained from."""
    from adapters.routing.service import RoutingService

    found = RoutingService(open_registry(home), None).history(limit=limit)
    if json:
        print_json(found)
        return
    rows = [
        (
            f"{item.number}{' *' if item.is_current else ''}",
            format_moment(item.trained_at),
            "yes" if item.can_be_restored else "deleted",
            ", ".join(f"{alias} {digest[:12]}" for alias, digest in item.versions.items()),
        )
        for item in found
    ]
    print_table(["router", "trained", "kept", "from"], rows, whole=["router", "trained", "kept"])


@app.command("rollback")
def rollback(home: HomeOption = None, base: BaseOption = None, json: JsonOption = False) -> None:
    """Route by the router before the present one, until an alias moves again."""
    number = _open(home, base).rollback()
    if json:
        print_json({"router": number})
    else:
        console.print(f"router {number} counts again; running servers follow within seconds")


@app.command("rules")
def rules(
    file: Annotated[
        Path | None, typer.Argument(help="YAML or JSON with the new rules; without it the present ones are shown.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show the rules that go before the router, or replace all of them."""
    from adapters.routing.rules import read_rules
    from adapters.routing.service import RoutingService

    service = RoutingService(open_registry(home), None)
    if file is not None:
        service.set_rules(read_rules(file))
    found = service.rules()
    if json:
        print_json({"rules": [rule.model_dump(exclude_none=True) for rule in found]})
        return
    rows = []
    for number, rule in enumerate(found, start=1):
        conditions = [f"metadata {key}={value}" for key, value in (rule.metadata or {}).items()]
        conditions += [f"key {rule.key}"] if rule.key else []
        conditions += [f"matches {rule.matches}"] if rule.matches else []
        rows.append((number, rule.name, " and ".join(conditions), rule.alias))
    print_table(["", "rule", "if", "then"], rows)
    for alias in service.unknown_in_rules():
        console.print(
            f"no alias is called {alias!r}: rules that name it are passed over until there is one", markup=False
        )


@app.command("learn")
def learn(
    name: Annotated[str, typer.Argument(help="A version, or an alias for the one that it points to.")],
    file: Annotated[Path, typer.Argument(help='JSON lines: {"text": ...}, or training data.')],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Give the router prompts for a version that was published without: an imported one, say."""
    from adapters.routing.prompts import prompts_of
    from adapters.routing.service import RoutingService

    num_kept = RoutingService(open_registry(home), None).keep_prompts(name, prompts_of(_read_rows(file)))
    if json:
        print_json({"name": name, "num_prompts": num_kept})
    else:
        console.print(f"{num_kept} prompts are kept with {name}; running servers train within seconds")


@app.command("forget")
def forget(
    name: Annotated[str, typer.Argument(help="A version, or an alias for the one that it points to.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Delete the prompts that are kept of a version; the router chooses it no more."""
    from adapters.routing.service import RoutingService

    RoutingService(open_registry(home), None).forget_prompts(name)
    if json:
        print_json({"name": name, "num_prompts": 0})
        return
    console.print(
        f"no prompts of {name} are kept; running servers train within seconds. The router can no longer know what "
        "belongs to it: its questions may go to another alias. A rule sends them home: hotswap route rules",
        markup=False,
        soft_wrap=True,
    )


def warn_unknown_to_router(registry: Registry, alias: str) -> None:
    """Say so where an alias points to a version without prompts while `auto` knows others: nothing else would tell."""
    from adapters.routing.service import RoutingService

    if RoutingService(registry, None).passes_over(alias):
        console.print(
            f"no prompts are kept of the version that {alias} points to: only a rule of auto chooses {alias} now, "
            f"and its questions may go to another alias. hotswap route learn {alias} FILE gives it some",
            markup=False,
            soft_wrap=True,
        )


def _read_rows(file: Path) -> list[Row]:
    """The rows of a file of JSON lines.

    Raises:
        InvalidInputError: it can't be read.
        DataError: lines that are wrong, by their number.
    """
    from adapters.chat_rows import parse_row
    from adapters.errors import DataError, InvalidInputError

    found, problems = [], []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row, wrong = parse_row(line)
                    found += [row] if row is not None else []
                    problems += [f"{file}:{number}: {problem}" for problem in wrong]
    except OSError as error:
        raise InvalidInputError(f"{file} can't be read: {error.strerror}") from None
    if problems or not found:
        raise DataError(problems[:20] or [f"{file} holds no rows"], num_more=max(0, len(problems) - 20))
    return found


def _open(home: Path | None, base: str | None) -> RoutingService:
    """The router of a home as a server there has it, trained if need be."""
    from adapters.base_files import pull_base
    from adapters.routing.embeddings import open_embeddings
    from adapters.routing.service import RoutingService
    from server.config import ServeSettings

    core = load_core(home, base=base)
    registry = open_registry(core.home)
    threshold = ServeSettings.load(core.home).route_threshold
    service = RoutingService(registry, open_embeddings(pull_base(core.base, core.home)), threshold=threshold)
    service.reconcile()
    return service


def _predictor(train: Path | None, home: Path | None, base: str | None) -> tuple[Predictor, tuple[str, ...], float]:
    """What is measured: the present router, or one that is trained from a file for it and forgotten."""
    from adapters.base_files import pull_base
    from adapters.routing.embeddings import open_embeddings
    from adapters.routing.evaluation import predictor_of
    from adapters.routing.prompts import group_labelled, read_background, read_labelled
    from server.config import ServeSettings

    core = load_core(home, base=base)
    threshold = ServeSettings.load(core.home).route_threshold
    if train is None:
        return *_open(home, base).predictor(), threshold
    from adapters.routing.training import train_router

    embeddings = open_embeddings(pull_base(core.base, core.home))
    model = train_router(group_labelled(read_labelled(train)), read_background(), embeddings)
    return predictor_of(model, embeddings), model.aliases, threshold


def _parse_metadata(given: list[str]) -> dict[str, str]:
    from adapters.errors import InvalidInputError

    pairs = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidInputError(f"expected KEY=VALUE, found {item[:80]!r}", param="metadata")
        pairs[key] = value
    return pairs


def _print_decision(decision: Decision, near: list[NearPrompt]) -> None:
    how = {"rule": "by a rule", "router": "by the router", "abstained": "the router abstains"}[decision.route]
    console.print(f"{decision.alias}  ({how}: {decision.reason})", markup=False, soft_wrap=True)
    if decision.probabilities:
        ranked = sorted(decision.probabilities.items(), key=lambda item: -item[1])
        rest = max(0.0, 1 - sum(decision.probabilities.values()))
        rows = [(alias, f"{value:.3f}") for alias, value in [*ranked, ("none of them", rest)]]
        print_table(["alias", "probability"], rows)
        console.print(f"threshold {decision.threshold:g}, router {decision.router}", style="dim")
    if near:
        print_table(
            ["nearest training prompts", "alias", "similarity"],
            [(item.text[:100], item.alias, f"{item.similarity:.2f}") for item in near],
        )


def _print_evaluation(result: Evaluation, threshold: float) -> None:
    def percent(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.1f} %"

    rows = [
        ("texts, of which belong nowhere", f"{result.num_texts}, {result.num_outside}"),
        ("accuracy of the best alias", percent(result.accuracy)),
        ("macro F1", f"{result.macro_f1:.3f}"),
        ("expected calibration error", f"{result.calibration_error:.3f}"),
        ("in/out AUC", None if result.auc is None else f"{result.auc:.3f}"),
        (f"routed at threshold {threshold:g}", percent(result.routed)),
        ("to a wrong alias", percent(result.misrouted)),
        ("belong nowhere, but were routed", percent(result.taken_in)),
        ("choice flips by typos", percent(result.flips_by_typos)),
        ("choice flips by case", percent(result.flips_by_case)),
        ("choice flips by paraphrase", percent(result.flips_by_paraphrase)),
    ]
    print_table(["measure", "value"], rows)
    points = [(percent(point.coverage), percent(point.risk)) for point in result.risk_coverage]
    print_table(["of the most confident", "are wrong"], points)
    console.print("of all texts; those that belong nowhere count as wrong there", style="dim", soft_wrap=True)
    columns = ["threshold", "routed", "to a wrong alias", "belong nowhere, but routed"]
    shares = [
        (f"{point.threshold:g}", percent(point.routed), percent(point.misrouted), percent(point.taken_in))
        for point in result.thresholds
    ]
    print_table(columns, shares)
    console.print(
        "A lower route_threshold (hotswap serve --route-threshold) routes more of what belongs to an alias, and more "
        "that is wrong: take the lowest whose errors you can live with. What is not routed goes to the base model.",
        soft_wrap=True,
    )
