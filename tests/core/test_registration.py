"""Registered parts: the name becomes a setting, and a class that breaks a rule is refused with its file and line."""

from __future__ import annotations

import pickle
import textwrap
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest

from soflow_core.networks import NETWORKS, DiTConfig
from soflow_core.objectives import OBJECTIVES, MeanFlow, SoFlow, SoFlowTimes
from soflow_core.parameterization import PARAMETERIZATIONS
from soflow_core.paths import PATHS
from soflow_core.registration import RegistrationError, Registry, UnknownPart, parts_in, register
from soflow_core.samplers.grids import GRIDS, PowerGrid
from soflow_core.schedule_shapes import SHAPES
from soflow_core.settings import identifying, to_dict
from soflow_core.times import LogitNormal, UniformTimes


@dataclass(frozen=True)
class Colour:
    """A kind of part with one setting of its own."""

    depth: int


COLOURS = Registry("colour", Colour, "name")


@register("red")
@dataclass(frozen=True)
class Red(Colour):
    """A part with every way of declaring a setting."""

    plain: int
    shades: tuple[float, ...] = (0.5,)
    made: tuple[str, ...] = field(default_factory=lambda: ("a",))
    hidden: int = field(default=3, repr=False)


def test_the_name_is_a_setting_that_stands_once() -> None:
    red = Red(1, 2)
    assert (red.depth, red.plain, red.shades, red.made, red.hidden, red.name) == (
        1,
        2,
        (0.5,),
        ("a",),
        3,
        "red",
    )  # type: ignore[attr-defined]
    assert [each.name for each in fields(Red)] == ["depth", "name", "plain", "shades", "made", "hidden"]
    assert COLOURS.read(to_dict(red)) == red == pickle.loads(pickle.dumps(red))
    assert replace(red, plain=5) != red
    assert len({red, Red(1, 2)}) == 1
    assert repr(red) == "Red(depth=1, name='red', plain=2, shades=(0.5,), made=('a',))"
    with pytest.raises(AttributeError):
        red.plain = 4  # type: ignore[misc]
    with pytest.raises(UnknownPart, match=r"its name is 'blue'; known are red"):
        COLOURS.read({"name": "blue"})


@pytest.mark.parametrize("registry", [OBJECTIVES, NETWORKS], ids=lambda registry: registry.field)
def test_every_class_of_a_package_is_registered_under_its_own_name(registry: Registry[object]) -> None:
    assert all(vars(part)[registry.field] == name for name, part in registry.items())
    assert len(set(registry.values())) == len(registry) > 0


def test_a_header_without_a_kind_describes_a_dit() -> None:
    config = DiTConfig(1, 8, 8, patch=2, hidden=32, depth=1, heads=2)
    values = to_dict(config)
    assert values.pop("kind") == "dit"
    assert NETWORKS.read(values) == config


WRONG = {
    "is no dataclass": '@register("mine")\nclass Mine(FlowMatching):\n    """A method."""',
    "can be changed": '@register("mine")\n@dataclass(eq=False)\nclass Mine(Objective):\n    """A method."""\n    size: int = 1',
    "has no docstring": '@register("mine")\n@dataclass(frozen=True)\nclass Mine(FlowMatching):\n    size: int = 1',
    "the setting `net`, which a header cannot hold": (
        '@register("mine")\n@dataclass(frozen=True)\nclass Mine(FlowMatching):\n    """A method."""\n'
        "    net: torch.nn.Module | None = None"
    ),
    "takes the name 'meanflow', which MeanFlow in": (
        '@register("meanflow")\n@dataclass(frozen=True)\nclass Mine(FlowMatching):\n    """A method."""'
    ),
    "has the name 'My method'": (
        '@register("My method")\n@dataclass(frozen=True)\nclass Mine(FlowMatching):\n    """A method."""'
    ),
    "declares `method`": (
        '@register("mine")\n@dataclass(frozen=True)\nclass Mine(FlowMatching):\n    """A method."""\n    method: str = "mine"'
    ),
    "lacks loss, sample": '@register("mine")\n@dataclass(frozen=True)\nclass Mine(Objective):\n    """A method."""',
    "draws no noise and no times: define draw_from": (
        '@register("mine")\n@dataclass(frozen=True)\nclass Mine(Objective):\n    """A method."""\n'
        "    def loss(self, *arguments, **settings): ...\n    def sample(self, *arguments, **settings): ..."
    ),
    "is of no kind of part": '@register("mine")\n@dataclass(frozen=True)\nclass Mine:\n    """A method."""',
    "does not say so: define the property needs_null_label": (
        '@register("mine")\n@dataclass(frozen=True)\nclass Mine(Whole):\n    """A method."""\n    drop: float = 0.1'
    ),
    "type cannot be read": (
        '@register("mine")\n@dataclass(frozen=True)\nclass Mine(FlowMatching):\n    """A method."""\n    net: Absent = None'
    ),
}
HEAD = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from soflow_core.objectives import FlowMatching, Objective
from soflow_core.registration import register

class Whole(Objective):
    draw = loss = sample = None

"""


@pytest.mark.parametrize("message", WRONG)
def test_a_class_that_breaks_a_rule_is_refused_with_its_file_and_line(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"mine_{abs(hash(message))}.py"
    path.write_text(HEAD + textwrap.dedent(WRONG[message]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RegistrationError) as caught:
        __import__(path.stem)
    line = 1 + path.read_text().splitlines().index(
        next(x for x in WRONG[message].splitlines() if x[0] == "@")
    )
    assert str(caught.value).startswith(f"{path}:{line}: Mine ")
    assert message in str(caught.value)
    assert "mine" not in OBJECTIVES
    assert OBJECTIVES["meanflow"] is MeanFlow


# Parts that a text names, and parts that are sections


def test_a_text_names_a_part_with_its_one_number() -> None:
    assert SHAPES.named("cosine") == SHAPES["cosine"]()
    assert GRIDS.named("power:3") == PowerGrid(power=3.0)
    with pytest.raises(UnknownPart, match="there is no path 'bent'; known are linear, trigonometric"):
        PATHS.named("bent")
    for text, says in (("linear:2", "linear has 0 settings"), ("linear:", "linear has 0 settings")):
        with pytest.raises(
            ValueError, match=rf"SoFlow\.path is '{text}': {says}; give linear, or linear:NUMBER"
        ):
            SoFlow(path=text)


def test_a_section_without_a_name_is_written_and_read_as_before_there_were_several() -> None:
    assert to_dict(MeanFlow())["time"] == {"mean": -0.4, "std": 1.0}
    assert LogitNormal.kind == "logit_normal"
    assert repr(LogitNormal(1.0, 2.0)) == "LogitNormal(mean=1.0, std=2.0)"
    for named in ({}, {"kind": "logit_normal"}):
        read = OBJECTIVES.read({"method": "meanflow", "time": {**named, "std": 2.0}})
        assert read == MeanFlow(time=LogitNormal(std=2.0))
    other = MeanFlow(time=UniformTimes(high=0.5))
    assert to_dict(other)["time"] == {"kind": "uniform", "low": 0.0, "high": 0.5}
    assert OBJECTIVES.read(to_dict(other)) == other
    assert identifying(MeanFlow, to_dict(other))["time"] == to_dict(other)["time"]
    with pytest.raises(UnknownPart, match="its kind is 'normal'; known are logit_normal, uniform"):
        OBJECTIVES.read({"method": "meanflow", "time": {"kind": "normal"}})
    with pytest.raises(ValueError, match="UniformTimes has no setting mean"):
        OBJECTIVES.read({"method": "meanflow", "time": {"kind": "uniform", "mean": 0.0}})


def test_the_parts_of_a_method_are_found_in_its_settings() -> None:
    method = SoFlow(path="trigonometric", times=SoFlowTimes(start=UniformTimes()))
    kinds = {type(part) for part in parts_in(method)}
    assert kinds >= {
        SoFlow,
        PATHS["trigonometric"],
        PARAMETERIZATIONS["euler"],
        UniformTimes,
        SHAPES["exponential"],
    }
