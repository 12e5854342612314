"""Names of trials' runs, and the page of a sweep in MLflow: what varies can be read there."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from soflow_platform.cli.sweep_file import read
from soflow_platform.config.experiment import varied_params
from soflow_platform.tracking.links import sweep_page, view_state
from soflow_platform.tracking.run_names import LONGEST, run_name
from soflow_platform.tracking.store import Tracking


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"objective.weight_power": 0.5, "objective.schedule.initial": 0.1}, "p=0.5 r0=0.1 #03"),
        ({"objective.guidance.scale": 2.98765, "optimizer.lr": 1e-3}, "w=2.99 lr=0.001 #03"),
        ({"objective": {"method": "meanflow", "guidance": {"omega": 1.0}}}, "meanflow #03"),
        (
            {"objective": {"method": "ect"}, "budget": "steps, evaluations"},
            "ect equal steps, evaluations #03",
        ),
        ({"objective.schedule": {"kind": "cosine", "final": 0.002}}, "r=cosine rK=0.002 #03"),
        ({}, "#03"),
    ],
)
def test_a_run_is_named_by_what_varies_and_its_number(settings: dict[str, object], name: str) -> None:
    assert run_name(3, settings) == name


def test_a_label_stands_in_the_place_of_settings() -> None:
    assert run_name(0, {"objective.weight_power": 0.5}, "paper") == "paper #00"


def test_names_of_many_settings_are_whole_settings_and_fit() -> None:
    for trial in read("xl2", ()).trials[1:]:
        name = run_name(trial.index, trial.settings)
        assert len(name) <= LONGEST
        assert name.endswith(f" ... #{trial.index:02d}")
        assert name.startswith("λ=0.")
        assert all("=" in part for part in name.split()[:-2])


def test_the_page_of_a_sweep_has_what_varies_as_columns() -> None:
    sweep = read("digits", ())
    params = varied_params([trial.experiment for trial in sweep.trials])
    assert params == ["objective.weight_power", "objective.schedule.initial"]
    state = json.loads(view_state("abc", "eval/fd_nfe1", True, params, ["eval/fd_nfe1", "eval/fd_nfe2"]))
    assert state["selectedColumns"] == [
        "metrics.`eval/fd_nfe1`",
        "metrics.`eval/fd_nfe2`",
        "params.`objective.weight_power`",
        "params.`objective.schedule.initial`",
    ]
    assert state["searchFilter"] == "tags.`mlflow.parentRunId` = 'abc'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`eval/fd_nfe1`", True)


def query(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(urlsplit(url).fragment).query)


def test_a_link_names_the_view_where_the_experiment_has_one() -> None:
    """With facets of its own in the URL MLflow would leave the view aside."""
    with_view = query(sweep_page("7", "abc", "eval/fd_nfe1", view=True))
    assert with_view["viewStateShareKey"] == ["abc"]
    assert "searchFilter" not in with_view
    before = query(sweep_page("7", "abc", "eval/fd_nfe1"))
    assert before["searchFilter"] == ["tags.`mlflow.parentRunId` = 'abc'"]
    assert "viewStateShareKey" not in before


def test_a_view_is_a_tag_of_the_experiment(tracking: Tracking) -> None:
    tracking.share_view("abc", "{}")
    tags = tracking.client.get_experiment(tracking.experiment_id).tags
    assert tags["mlflow.sharedViewState.abc"] == "{}"
