"""Settings out of their range are refused where they are made."""

import dataclasses
import math
from typing import Any, get_type_hints

import pytest

from soflow_core.guidance import Guidance, IntervalGuidance, ScaleRange, VelocityGuidance
from soflow_core.objectives import (
    OBJECTIVES,
    AlphaFlow,
    AlphaSchedule,
    Diffusion,
    FlowMatching,
    MeanFlow,
    SoFlow,
)
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import PassPolicy
from soflow_core.settings import SAMPLING, identifying, marked, setting, to_dict
from soflow_core.times import LogitNormal, RatioSchedule


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (SoFlow, {"path": "Trig"}),
        (SoFlow, {"parameterization": "Triangular"}),
        (RatioSchedule, {"kind": "Const"}),
        (AlphaSchedule, {"kind": "linear"}),
        (FlowMatching, {"path": "trig"}),
        (FlowMatching, {"sampler": "dopri5"}),
        (Diffusion, {"sampler": "DDIM"}),
        (OptimizerConfig, {"name": "sgd"}),
        (OptimizerConfig, {"decay": "exponential"}),
        (PassPolicy, {"precision": "bf16"}),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_those_that_are(kind: type[Any], setting: str) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} is '{value}'; it is one of '"):
        kind(**setting)


@pytest.mark.parametrize("kind", [SoFlow, MeanFlow, AlphaFlow])
def test_shares_and_weights_out_of_their_range_are_refused(kind: type[Any]) -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"flow_matching_share is {share}; a share from 0 to 1"):
            kind(flow_matching_share=share)
    with pytest.raises(ValueError, match="weight_eps is 0; it must be above 0"):
        kind(weight_eps=0)


@pytest.mark.parametrize("kind", [Guidance, VelocityGuidance, FlowMatching, Diffusion])
def test_a_label_cannot_always_be_dropped(kind: type[Any]) -> None:
    with pytest.raises(ValueError, match="drop is 1; a probability from 0 to below 1"):
        kind(drop=1)


NUMBERS = [
    (kind, field.name)
    for kind in (
        *OBJECTIVES.values(),
        OptimizerConfig,
        Guidance,
        VelocityGuidance,
        IntervalGuidance,
        ScaleRange,
        RatioSchedule,
        AlphaSchedule,
        LogitNormal,
    )
    for field in dataclasses.fields(kind)
    if get_type_hints(kind)[field.name] in (int, float)
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 10**400])
def test_a_number_that_is_not_finite_is_refused_in_every_setting(
    kind: type[Any], name: str, value: object
) -> None:
    others = {"low": 1.0, "high": 2.0} if kind is ScaleRange else {}
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}\.{name} is .*; a (finite|whole) number is needed"
    ):
        kind(**{**others, name: value})


def test_a_nested_setting_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SoFlow\.guidance is 'x'; Guidance is needed"):
        SoFlow(guidance="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"OptimizerConfig\.betas"):
        OptimizerConfig(betas=(0.9, math.nan))


@pytest.mark.parametrize("kind", [Guidance, IntervalGuidance])
@pytest.mark.parametrize("value", [math.nan, True, "1", None])
def test_a_scale_that_is_no_number_and_no_range_is_refused(kind: type[Any], value: object) -> None:
    sentence = rf"{kind.__name__}\.scale is {value!r}; a finite number is needed, or ScaleRange\(low, high\)"
    with pytest.raises(ValueError, match=sentence):
        kind(scale=value)


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 1
    later: int = setting(2, inert=True)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    sampler: str | None = setting(None, inert=True, sampling=True)
    method: str = setting("a", sampling=True)


def test_an_inert_default_is_no_part_of_what_identifies_settings() -> None:
    assert identifying(Outer, to_dict(Outer())) == {"inner": {"depth": 1}, "method": "a"}
    changed = to_dict(Outer(Inner(later=3), sampler="ode"))
    assert identifying(Outer, changed) == changed
    assert marked(Outer(), SAMPLING) == ("sampler", "method")
