"""validate names the settings in which trials depart from the paper's recipe, where they were written and what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_platform.cli.sweep_file import read
from soflow_platform.cli.validate import recipe_warnings, validate_command
from soflow_platform.config.presets import sweeps_folder
from tests.support.sweep_files import write

OWN = """\
name: own
extends: b4
objective: {guidance: {scale: 2.0}}
training: {ema: [0.999]}
search: !replace
  metric: eval/fid_nfe1
  space:
    objective.schedule.final: [0.002, 0.01, 0.02]
"""


def warnings(folder: Path, *overrides: str) -> list[str]:
    return recipe_warnings(read(str(write(folder, OWN)), overrides))


def test_each_departure_is_named_with_its_place_and_the_published_value(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    assert warnings(tmp_path, "optimizer.lr=2e-4") == [
        "warning: 3 of 3 trials depart from the paper's recipe:",
        f"  `objective.guidance.scale` is 2 ({path}, line 3), and 3 in b4",
        "  `optimizer.lr` is 0.0002 (--set optimizer.lr), and 0.0001 in b4",
        f"  `training.ema` is [0.999] ({path}, line 4), and [0.9999] in b4",
        "  `objective.schedule.final` is 0.01 to 0.02 in 2 of them (search.space), and 0.002 in b4",
    ]


def test_a_section_in_the_place_of_a_value_is_shown(tmp_path: Path) -> None:
    lines = warnings(tmp_path, "objective.guidance.scale={low: 1.0, high: 4.0}")
    assert any("`objective.guidance.scale` is {low: 1, high: 4} (--set" in line for line in lines)


def test_the_length_is_that_of_the_size(tmp_path: Path) -> None:
    lines = warnings(tmp_path, "network.size=XL/2")
    assert any("`training.steps` is 400000 (" in line and "and 1200000 in xl2" in line for line in lines)


def test_a_size_that_was_not_published_is_compared_with_b4(tmp_path: Path) -> None:
    assert any(
        "`network.size` is S/4 (--set network.size), and B/4 in b4" in line
        for line in warnings(tmp_path, "network.size=S/4")
    )


@pytest.mark.parametrize("name", ["b4", "b2", "m2", "l2", "xl2", "cifar10", "cifar10-unet"])
def test_a_shipped_recipe_is_left_in_nothing_but_what_its_search_varies(name: str) -> None:
    sweep = read(name, ())
    head, *lines = recipe_warnings(sweep)
    total = len(sweep.trials)
    assert head == f"warning: {total - 1} of {total} trials depart from the paper's recipe:"
    assert lines
    assert all("(search.space)" in line for line in lines)
    assert recipe_warnings(read(name, ("search={metric: eval/fid_nfe1}",))) == []


def test_data_and_methods_without_a_recipe_have_no_warnings() -> None:
    assert recipe_warnings(read("digits", ())) == []
    assert (
        recipe_warnings(read("b4", ("objective={method: meanflow}", "search={metric: eval/fid_nfe1}"))) == []
    )


def test_warnings_are_printed_apart_from_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    validate_command("b4", ())
    printed = capsys.readouterr()
    assert printed.out.startswith(
        f"{sweeps_folder() / 'b4.yaml'} is valid: 25 trial(s) of soflow, 400,000 steps"
    )
    assert "`objective.guidance.mix` is 0." in printed.err
