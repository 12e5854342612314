"""A proxy runs a sweep's search at the size, length and machines of another, and says what that leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_platform.cli.sweep_file import CheckedSweep, read
from soflow_platform.errors import UserError
from tests.support.sweep_files import write


def xl2_at_b4(*overrides: str) -> CheckedSweep:
    return read("xl2", overrides, proxy="b4")


def test_a_proxy_has_the_space_of_the_sweep_and_the_size_of_the_other() -> None:
    own, other, proxy = read("xl2", ()).experiment, read("b4", ()).experiment, xl2_at_b4().experiment
    assert proxy.search.space == own.search.space
    assert (proxy.search.trials, proxy.search.metric) == (own.search.trials, own.search.metric)
    assert (proxy.network, proxy.resources) == (other.network, other.resources)
    assert (proxy.training.steps, proxy.training.batch) == (400_000, 256)
    assert proxy.objective == own.objective
    assert (proxy.name, proxy.model_name) == ("xl2-at-b4", "xl2-at-b4")


def test_rungs_keep_their_share_of_the_training() -> None:
    asha = xl2_at_b4().experiment.search.asha
    assert asha is not None
    assert asha.first_rung == round(100_000 * 400_000 / 1_200_000)


def test_what_is_left_out_is_said() -> None:
    first, second = xl2_at_b4().left_out
    assert first == "network B/4 for XL/2: scores rank settings at that size, and are none of xl2"
    assert second.startswith("400,000 steps for 1,200,000: schedules r(k, K)")


def test_a_setting_that_the_proxy_decides_does_not_vary(tmp_path: Path) -> None:
    first = "first: [{training.batch: 512, optimizer.lr: 2e-4}]"
    text = f"extends: xl2\nname: mine\nsearch: {{{first}, space: {{training.batch: [256, 512]}}}}\n"
    proxy = read(str(write(tmp_path, text)), (), proxy="b4")
    assert "training.batch" not in proxy.experiment.search.space
    assert proxy.experiment.search.first == ({"optimizer.lr": 2e-4},)
    assert "`training.batch` does not vary: the proxy decides it" in proxy.left_out
    assert "`training.batch` of search.first is left out: the proxy decides it" in proxy.left_out


def test_a_search_of_nothing_else_is_refused(tmp_path: Path) -> None:
    text = "extends: xl2\nname: mine\nsearch: {space: !replace {network.size: [L/2, XL/2]}}\n"
    with pytest.raises(UserError, match="--proxy b4: every setting that mine varies"):
        read(str(write(tmp_path, text)), (), proxy="b4")


def test_overrides_are_laid_over_the_proxy() -> None:
    assert xl2_at_b4("training.steps=100_000", "resources.workers=2").experiment.training.steps == 100_000


def test_a_registered_model_of_the_sweep_is_not_given_the_proxys_network(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: xl2\nname: mine\nregistry: {model: faces}\n")
    assert read(str(path), (), proxy="b4").experiment.model_name == "mine-at-b4"


def test_a_proxy_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="there is no sweep file absent"):
        read("xl2", (), proxy="absent")
