"""Each method's default settings, and what it draws by them, are its recipe's (docs/methods.md)."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.special import ndtr

from soflow_core.objectives import OBJECTIVES, Draws, Shortcut
from soflow_core.optimizer import OptimizerConfig
from soflow_core.settings import to_dict
from soflow_core.train_step import TrainStep

DIFFUSION_STEPS = 1000
WINDOW = {"start": 0.0, "end": 1.0, "drop": 0.1}
RECIPES = {
    "soflow": {
        "flow_matching_share": 0.75,
        "weight_power": 1.0,
        "weight_eps": 0.01,
        "path": "linear",
        "parameterization": "euler",
        "times": {
            "velocity": {"mean": -0.2, "std": 1.0},
            "start": {"mean": 0.2, "std": 0.8},
            "end": {"mean": -1.0, "std": 0.8},
        },
        "guidance": {"scale": 3.0, "mix": 0.25, "drop": 0.1, "decay_from": 0.8},
        "schedule": {"kind": "exponential", "initial": 0.1, "final": 0.002},
    },
    "flow_matching": {
        "path": "linear",
        "time": None,
        "drop": 0.1,
        "sampler": "euler",
        "sampling_scale": 1.0,
    },
    "diffusion": {
        "diffusion_steps": DIFFUSION_STEPS,
        "beta_first": 1e-4,
        "beta_last": 0.02,
        "drop": 0.1,
        "sampler": "ddim",
        "sampling_scale": 1.0,
    },
    "ict": {
        "time": {"mean": -1.1, "std": 2.0},
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "first_levels": 10,
        "last_levels": 1280,
        "huber": 0.00054,
    },
    "ect": {"time": {"mean": -1.1, "std": 2.0}, "quotient": 2.0, "stages": 8, "offset": 8.0, "huber": 0.0},
    "scm": {"time": {"mean": -1.0, "std": 1.4}, "warmup_steps": 10_000, "tangent_eps": 0.1},
    "meanflow": {
        "flow_matching_share": 0.75,
        "weight_power": 1.0,
        "weight_eps": 0.01,
        "time": {"mean": -0.4, "std": 1.0},
        "guidance": {"omega": 1.0, "kappa": 0.0, **WINDOW},
    },
    "alphaflow": {
        "flow_matching_share": 0.25,
        "weight_eps": 0.001,
        "time": {"mean": -0.4, "std": 1.0},
        "guidance": {"omega": 1.0, "kappa": 0.5, **WINDOW},
        "schedule": {
            "kind": "sigmoid",
            "start": 0.0,
            "end": 1.0,
            "steepness": 25.0,
            "snap": 0.005,
            "value": 0.01,
        },
    },
    "shortcut": {
        "base_steps": 128,
        "bootstrap_share": 0.125,
        "teacher_ema": 0.999,
        "drop": 0.1,
        "scale": 1.5,
    },
}


def test_the_defaults_of_every_method_are_its_recipe():
    found = {method: to_dict(kind()) for method, kind in OBJECTIVES.items()}
    assert found == {method: {"method": method, **recipe} for method, recipe in RECIPES.items()}


def test_the_defaults_of_a_training_are_those_of_soflow_on_imagenet():
    config = OptimizerConfig()
    assert (config.name, config.lr, config.betas, config.weight_decay) == ("adamw", 1e-4, (0.9, 0.99), 0.0)
    assert (config.warmup_steps, config.decay) == (0, "constant")
    parameters = inspect.signature(TrainStep).parameters
    assert parameters["ema_decays"].default == (0.9999,)
    assert parameters["clip_norm"].default is None


# Distributions, by the Kolmogorov-Smirnov distance of many draws

ROWS = 20_000
# Of 5000 rows, the least below, one seed in 250 comes farther than this from the right distribution; the seed is fixed.
NEAR = 0.025


def distance(values: Tensor, cdf) -> float:
    """The largest distance of the empirical distribution function from `cdf`."""
    ordered = cdf(values.double().sort().values)
    steps = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    return (ordered - steps).abs().max().item()


def logit_normal(mean: float, std: float):
    return lambda t: ndtr((torch.logit(t) - mean) / std)


def cut_logit_normal(mean: float, std: float, low: float, high: float):
    """Of sigma from low to high alone, whose logarithm is the logit of t."""
    bounds = ndtr((torch.tensor([low, high], dtype=torch.float64).log() - mean) / std)
    return lambda t: (logit_normal(mean, std)(t) - bounds[0]) / (bounds[1] - bounds[0])


def larger(cdf):
    """Of two draws."""
    return lambda t: cdf(t) ** 2


def smaller(cdf, other):
    return lambda t: 1 - (1 - cdf(t)) * (1 - other(t))


def grid(count: int):
    """1 / count, 2 / count, ..., 1 equally often; the function half way up each jump."""
    return lambda t: t - 0.5 / count


def draw(method: str, rows: int = ROWS) -> Draws:
    return OBJECTIVES[method]().draw(torch.Generator().manual_seed(0), rows, (1, 1, 1), conditional=True)


ONE = logit_normal(-0.4, 1.0)
START = logit_normal(0.2, 0.8)


TIMES = [
    ("soflow", "leading", "t", logit_normal(-0.2, 1.0)),
    ("soflow", "other", "t", START),
    ("soflow", "other", "s", smaller(logit_normal(-1.0, 0.8), START)),
    ("flow_matching", "leading", "t", lambda t: t),
    ("diffusion", "leading", "t", lambda n: (n + 0.5) / DIFFUSION_STEPS),
    ("ict", "other", "t", cut_logit_normal(-1.1, 2.0, 0.002, 80.0)),
    ("ect", "other", "t", logit_normal(-1.1, 2.0)),
    ("scm", "other", "t", logit_normal(-1.0, 1.4)),
    ("meanflow", "leading", "t", larger(ONE)),
    ("meanflow", "other", "t", larger(ONE)),
    ("meanflow", "other", "s", smaller(ONE, ONE)),
    ("alphaflow", "leading", "t", larger(ONE)),
    ("alphaflow", "other", "t", larger(ONE)),
    ("alphaflow", "other", "s", smaller(ONE, ONE)),
    ("shortcut", "leading", "t", grid(128)),
]


@pytest.mark.parametrize(("method", "part", "time", "cdf"), TIMES, ids=["-".join(row[:3]) for row in TIMES])
def test_times_have_the_distribution_of_the_method(method, part, time, cdf):
    draws = draw(method)
    times, first = getattr(draws, time), draws.velocity_rows
    assert distance(times[:first] if part == "leading" else times[first:], cdf) < NEAR


@pytest.mark.parametrize("method", OBJECTIVES)
def test_noise_is_normal_and_leading_rows_are_those_with_one_time(method):
    shares = {
        "soflow": 0.75,
        "flow_matching": 1.0,
        "diffusion": 1.0,
        "meanflow": 0.75,
        "alphaflow": 0.25,
        "shortcut": 0.875,
    }
    draws = draw(method)
    assert distance(draws.noise.flatten(), ndtr) < NEAR
    assert draws.velocity_rows == shares.get(method, 0.0) * ROWS
    gap = draws.t - draws.s
    assert (gap[draws.velocity_rows :] > 0).all()
    leading = gap[: draws.velocity_rows]
    assert torch.equal(leading, torch.full_like(leading, 1 / 128 if method == "shortcut" else 0))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_one_label_in_ten_is_dropped_where_the_method_has_guidance(method):
    draws = draw(method)
    if method in ("ict", "ect", "scm"):
        assert draws.dropped is None
        return
    trained = draws.dropped[: draws.velocity_rows] if method == "shortcut" else draws.dropped
    assert trained.double().mean().item() == pytest.approx(0.1, abs=0.007)
    assert int(draws.dropped.sum()) == int(trained.sum())


def test_diffusion_draws_every_step_number():
    counts = torch.bincount(draw("diffusion", 100 * DIFFUSION_STEPS).t.long(), minlength=DIFFUSION_STEPS)
    assert len(counts) == DIFFUSION_STEPS
    assert ((counts - 100).abs() < 60).all()


@pytest.mark.parametrize("batch_size", [8, 16, 128])
def test_every_step_size_of_shortcut_is_trained_equally_often_at_any_batch_size(batch_size):
    generator, counts, rounds = torch.Generator().manual_seed(0), torch.zeros(7), 1400
    for _ in range(rounds):
        draws = Shortcut().draw(generator, batch_size, (1, 1, 1), conditional=False)
        gap = (draws.t - draws.s)[draws.velocity_rows :]
        counts += torch.bincount(-gap.log2().round().long(), minlength=7)
    expected = rounds * batch_size / 8 / 7
    # Each step of training has each size floor or ceil(B / 56) times: at most half a time from its mean, by deviation.
    assert ((counts - expected).abs() < 4 * 0.5 * rounds**0.5).all()
