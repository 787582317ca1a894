"""What all lists answer to a place that is not in them."""

from __future__ import annotations

import pytest

from server.auth import read_access
from tests.support.engine import RECIPES, Site, on_site

FIRST, SECOND, *_ = RECIPES
LISTS = {
    "/v1/files": "file-0",
    "/v1/fine_tuning/jobs": "ftjob-0",
    "/v1/experiments": "exp-000000000000",
}
# Their places are numbers, or names in the order of the alphabet: there is always something behind.
ORDERED = {
    "/v1/adapters",
    "/v1/adapters/{alias}/history",
    "/v1/adapters/{alias}/versions",
    "/v1/experiments/{experiment}/decisions",
}
OF_ONE_JOB = {"/v1/fine_tuning/jobs/{job_id}/events", "/v1/fine_tuning/jobs/{job_id}/checkpoints"}


def test_lists_are_all_known_here_when_they_take_a_place(site: Site) -> None:
    """A new list has to say what it answers; and the look at the document must have found some."""
    document = site.app.openapi()
    found = {
        path
        for path, methods in document["paths"].items()
        if any(parameter["name"] == "after" for parameter in methods.get("get", {}).get("parameters", ()))
    }
    # The list of jobs reads its query by hand, since metadata[key]=value is no name of a parameter.
    assert found | {"/v1/fine_tuning/jobs"} == {*LISTS, *ORDERED, *OF_ONE_JOB}
    assert found <= {access.path for access in read_access(site.app)}


@pytest.mark.parametrize(("path", "absent"), LISTS.items())
def test_list_is_400_when_it_is_to_go_on_behind_what_is_not_in_it(path: str, absent: str, site: Site) -> None:
    """One answer for all of them, and it names the parameter."""
    response = on_site(site, lambda http: http.get(path, params={"after": absent}))
    error = response.json()["error"]
    assert (400, "invalid_value", "after") == (response.status_code, error["code"], error["param"])
    assert f"after: there is nothing called '{absent}' in this list" == error["message"]


def test_list_says_the_same_when_the_key_may_not_see_the_place(site: Site) -> None:
    """An experiment on another alias is as absent as one that never was."""
    for adapter in (FIRST, SECOND):
        site.publish("support", adapter)
    hidden = site.experiments.create("support", [("A", "v1", 50), ("B", "v2", 50)])
    _, secret = site.keys.create("web", scopes=["experiments"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}
    response = on_site(site, lambda http: http.get("/v1/experiments", params={"after": hidden.id}, headers=headers))
    assert (400, "after") == (response.status_code, response.json()["error"]["param"])
