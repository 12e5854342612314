"""A sweep file extends others by path or by the name of a shipped one, takes keys of theirs away, and replaces whole sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from soflow_platform.config.document import read_document
from soflow_platform.config.presets import find_sweep, sweeps_folder
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from tests.support.sweep_files import MINIMAL, write

BASE = """\
search:
  asha: {first_rung: 20}
  space:
    objective.weight_power: [0.5, 1.0]
    objective.schedule.final: [0.002, 0.01]
"""


def child(tmp_path: Path, text: str, *overrides: str) -> dict[str, Any]:
    """The merged settings of a file with this text over MINIMAL and BASE."""
    write(tmp_path, MINIMAL + BASE, "base.yaml")
    return read_document(write(tmp_path, f"extends: base.yaml\n{text}", "child.yaml"), overrides).data


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        child(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "sweeps/digits.yaml"])
def test_a_shipped_file_is_extended_by_name_from_any_folder(tmp_path: Path, name: str) -> None:
    experiment, document = read_experiment(write(tmp_path, f"extends: {name}\nname: mine\n"))
    assert (experiment.name, experiment.data.source) == ("mine", "digits")
    assert document.origin(("data", "source")).source.endswith("digits.yaml")


def test_a_file_beside_the_child_is_meant_before_a_shipped_one(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "digits.yaml")
    assert read_document(write(tmp_path, "extends: digits.yaml\n", "child.yaml")).data["name"] == "small"
    assert read_document(write(tmp_path, "extends: digits\n", "child.yaml")).data["name"] == "digits"


def test_run_and_extends_find_the_same_shipped_file() -> None:
    for name in ("xl2", "xl2.yaml", "sweeps/xl2.yaml"):
        assert find_sweep(name, Path("/nowhere")) == sweeps_folder() / "xl2.yaml"


def test_a_file_that_is_nowhere_is_refused_with_line_and_known_names(tmp_path: Path) -> None:
    path = write(tmp_path, "name: mine\nextends: absent\n", "child.yaml")
    with pytest.raises(
        UserError, match=r"child.yaml, line 2: `extends`: there is no sweep file absent; give a path"
    ) as caught:
        read_document(path)
    assert "digits" in str(caught.value)


def test_a_dropped_key_is_gone_and_its_section_stays(tmp_path: Path) -> None:
    search = child(tmp_path, "search: {asha: !drop, space: {objective.weight_power: !drop}}")["search"]
    assert search == {"space": {"objective.schedule.final": [0.002, 0.01]}}


def test_a_replaced_section_has_nothing_of_the_one_below(tmp_path: Path) -> None:
    data = child(tmp_path, "search:\n  space: !replace\n    optimizer.lr: [1e-3]\n")
    assert data["search"] == {"asha": {"first_rung": 20}, "space": {"optimizer.lr": [0.001]}}
    assert child(tmp_path, "search: !replace {}")["search"] == {}


def test_another_distribution_of_times_has_nothing_of_the_one_below(tmp_path: Path) -> None:
    own = "objective: {times: {velocity: {mean: 1.0, std: 2.0}}}\n"
    write(tmp_path, own, "times.yaml")
    for text, expected in (
        ("{kind: uniform}", {"kind": "uniform"}),
        ("{kind: logit_normal, std: 1.0}", {"kind": "logit_normal", "mean": 1.0, "std": 1.0}),
        ("{std: 1.0}", {"mean": 1.0, "std": 1.0}),
    ):
        text = f"extends: times.yaml\nobjective: {{times: {{velocity: {text}}}}}\n"
        assert (
            read_document(write(tmp_path, text, "child.yaml")).data["objective"]["times"]["velocity"]
            == expected
        )


def test_an_override_takes_a_key_away(tmp_path: Path) -> None:
    assert "asha" not in child(tmp_path, "", "search.asha=!drop")["search"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("search: {ahsa: !drop}", [], "child.yaml, line 2: `search.ahsa` cannot be dropped, for no file"),
        ("search: {asha: !drop 3}", [], "child.yaml, line 2: !drop takes a key away and has no value"),
        ("training: {ema: [!drop]}", [], "child.yaml, line 2: !drop takes a key away; a list is replaced"),
        ("training: {steps: !replace 3}", [], "child.yaml, line 2: !replace stands before a section"),
        ("", ["search.ahsa=!drop"], "--set search.ahsa: `search.ahsa` cannot be dropped"),
        (
            "",
            ["search={asha: !drop}"],
            "--set search: !drop takes one key away: write --set search.KEY=!drop",
        ),
    ],
)
def test_a_tag_in_the_wrong_place_is_refused(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    assert message in refusal(tmp_path, text, *overrides)


def test_a_file_that_extends_none_has_nothing_to_drop(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 7: `seed` cannot be dropped"):
        read_document(write(tmp_path, f"{MINIMAL}seed: !drop\n"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.space.objective.weight_power=[0.25]", {"objective.weight_power": [0.25]}),
        ("search.space.objective.schedule.final=[0.1]", {"objective.schedule.final": [0.1]}),
        ("search.space.optimizer.lr={log: [1e-4, 1e-3]}", {"optimizer.lr": {"log": [1e-4, 1e-3]}}),
        ("search.space.seed=[1, 2]", {"seed": [1, 2]}),
    ],
)
def test_one_key_of_the_search_space_is_set_by_the_path_of_its_setting(
    tmp_path: Path, override: str, expected: dict[str, Any]
) -> None:
    before = child(tmp_path, "")["search"]["space"]
    assert child(tmp_path, "", override)["search"]["space"] == {**before, **expected}


def test_a_part_of_a_dimension_and_a_key_to_drop_are_found_in_the_search_space(tmp_path: Path) -> None:
    space = child(
        tmp_path,
        "search: {space: {optimizer.lr: {log: [1e-4, 1e-3], when: {seed: 1}}}}",
        "search.space.optimizer.lr.log=[1e-3, 2e-3]",
        "search.space.objective.weight_power=!drop",
    )["search"]["space"]
    assert space == {
        "objective.schedule.final": [0.002, 0.01],
        "optimizer.lr": {"log": [1e-3, 2e-3], "when": {"seed": 1}},
    }


def test_a_whole_search_space_is_replaced(tmp_path: Path) -> None:
    space = child(tmp_path, "", "search.space={seed: [1, 2]}")["search"]["space"]
    assert space == {"seed": [1, 2]}


def test_a_key_that_the_search_space_has_not_cannot_be_dropped(tmp_path: Path) -> None:
    message = refusal(tmp_path, "", "search.space.optimizer.lr=!drop")
    assert message.startswith(
        "--set search.space.optimizer.lr: `search.space.optimizer.lr` cannot be dropped"
    )
