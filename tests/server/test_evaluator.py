"""The evaluator beside the routes, and a person's decisions over HTTP, on a site whose engine is up."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from adapters.experiment_evaluation import EVALUATOR, ExperimentEvaluation
from adapters.records import AnalysisPlan, Experiment, Guardrail, Metric
from server.evaluator import Evaluator
from tests.support.background import run_until
from tests.support.engine import RECIPES, Site, on_site
from tests.support.experiments import HALVES, add_users

FIRST, SECOND, *_ = RECIPES
CHAT = {"model": "legal", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "user": "ann"}
YES, NO = {"solved": 1.0}, {"solved": 0.0}


def _start(site: Site, **plan: Any) -> Experiment:
    site.publish("legal", FIRST)
    site.publish("legal", SECOND, promote=False)
    usual: dict[str, Any] = {
        "metric": Metric("solved", "increase", "share"),
        "guardrails": (Guardrail("error_rate", "decrease", 0.02),),
        "planned_units": 1000,
    }
    return site.experiments.create("legal", HALVES, salt="s", plan=AnalysisPlan(**usual | plan))


def _break(site: Site, experiment: Experiment) -> None:
    add_users(site.registry, experiment, "A", [YES] * 60)
    add_users(site.registry, experiment, "B", [None] * 60, error="the model failed")


def _call(site: Site, method: str, path: str, **options: Any) -> httpx.Response:
    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.request(method, path, **options)

    return on_site(site, scenario)


def _evaluator(site: Site, interval_s: float) -> Evaluator:
    return Evaluator(site.services.evaluation.acting_for(EVALUATOR), interval_s=interval_s)


def test_alias_answers_with_the_control_when_one_evaluation_has_seen_the_errors(site: Site) -> None:
    """Requests go to both arms before it, and all of them to the control after it."""
    experiment = _start(site, auto_rollback=True)
    _break(site, experiment)

    async def scenario(http: httpx.AsyncClient) -> tuple[set[str], set[str]]:
        users = [CHAT | {"user": f"user {number}"} for number in range(4)]
        before = {(await http.post("/v1/chat/completions", json=body)).headers["x-hotswap-version"] for body in users}
        evaluator = _evaluator(site, interval_s=3600)
        await run_until(lambda: site.experiments.get(experiment.id).state != "running", evaluator.run())
        answers = [await http.post("/v1/chat/completions", json=body) for body in users]
        return before, {
            f"{answer.headers['x-hotswap-version']} by {answer.headers['x-hotswap-route']}" for answer in answers
        }

    before, after = on_site(site, scenario)
    assert ({"legal@v1", "legal@v2"}, {"legal@v1 by alias"}) == (before, after)


def test_evaluator_goes_on_when_the_database_was_away_or_numbers_overflow(site: Site) -> None:
    """It has nobody to tell, and tries again."""
    looks: list[int] = []

    class Failing(ExperimentEvaluation):
        def evaluate_all(self) -> None:
            looks.append(len(looks))
            if len(looks) == 1:
                raise OperationalError("SELECT", {}, Exception("the database is away"))
            if len(looks) == 2:
                raise OverflowError("math range error")

    evaluator = Evaluator(Failing(site.registry), interval_s=0.001)
    asyncio.run(run_until(lambda: len(looks) >= 4, evaluator.run()))
    assert [0, 1, 2, 3] == looks[:4]


def test_detail_holds_what_the_command_line_shows_when_read(site: Site) -> None:
    """Verdict, effects over time, guardrails, split; each with its numbers."""
    experiment = _start(site)
    add_users(site.registry, experiment, "A", [YES, NO] * 100)
    add_users(site.registry, experiment, "B", [YES, YES, YES, YES, NO] * 40)
    body = _call(site, "GET", f"/v1/experiments/{experiment.id}").json()
    (treatment,) = body["treatments"]
    (guardrail,) = treatment["guardrails"]
    verdict = body["verdict"]
    assert ("continue", "B", "better", "open", [200, 200]) == (
        verdict["kind"], verdict["arm"], treatment["outcome"], guardrail["state"], body["split"]["counts"],
    )  # fmt: skip
    assert treatment["primary"]["difference"] == body["history"][-1]["interval"]
    assert ["primary", "guardrail"] == [metric["role"] for metric in body["report"][0]["metrics"]][:2]
    assert 0.3 == pytest.approx(treatment["primary"]["difference"]["estimate"])


@pytest.mark.parametrize(("act", "body", "number"), [("promote", {"arm": "B"}, 2), ("rollback", {}, 1)])
def test_person_decides_when_the_verdict_does_not(site: Site, act: str, body: dict[str, str], number: int) -> None:
    """Everybody gets that arm's version; the log has the reason, and the second call finds it decided."""
    experiment = _start(site)
    path = f"/v1/experiments/{experiment.id}/{act}"
    decided = _call(site, "POST", path, json=body | {"reason": "because"})
    assert (200, "decided") == (decided.status_code, decided.json()["state"])
    assert number == site.registry.alias("legal").current.number
    assert ("because", "continue") == (
        site.experiments.decisions(experiment.id)[-1].reason,
        site.experiments.decisions(experiment.id)[-1].numbers["kind"],
    )
    assert 409 == _call(site, "POST", path, json=body).status_code


@pytest.mark.parametrize(
    ("act", "body", "status", "param"),
    [
        ("promote", {}, 400, "arm"),
        ("promote", {"arm": "A"}, 400, "arm"),
        ("promote", {"arm": "C"}, 409, None),
        ("promote", {"arm": "B b"}, 400, "arm"),
        ("rollback", {"arm": "B"}, 400, "arm"),
        ("accept-feedback", {}, 400, "reason"),
    ],
)
def test_decision_is_refused_when_it_can_not_be_meant(
    site: Site, act: str, body: dict[str, str], status: int, param: str | None
) -> None:
    """Nothing is written, and the experiment runs on."""
    experiment = _start(site)
    answer = _call(site, "POST", f"/v1/experiments/{experiment.id}/{act}", json=body)
    assert (status, param) == (answer.status_code, answer.json()["error"]["param"])
    assert ["start"] == [decision.action for decision in site.experiments.decisions(experiment.id)]


def test_difference_in_feedback_is_accepted_when_a_person_says_so(site: Site) -> None:
    """The next verdict promotes what was held back before."""
    experiment = _start(site, guardrails=())
    add_users(site.registry, experiment, "A", [YES, NO] * 200)
    add_users(site.registry, experiment, "B", [YES, None] * 200)
    path = f"/v1/experiments/{experiment.id}"
    assert "continue" == _call(site, "GET", path).json()["verdict"]["kind"]
    accepted = _call(site, "POST", f"{path}/accept-feedback", json={"reason": "B's button is lower"})
    assert (200, "running") == (accepted.status_code, accepted.json()["state"])
    assert "B's button is lower" == site.experiments.decisions(experiment.id)[-1].reason
    verdict = _call(site, "GET", path).json()["verdict"]
    assert ("promote", True) == (verdict["kind"], verdict["notes"][0].startswith("Accepted by hand: solved"))
