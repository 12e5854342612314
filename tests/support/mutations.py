"""Mutation tests of the methods: breaks one line at a time in a copy of the sources and runs the tests on it.

python -m tests.support.mutations             # all mutations: a table of the tests that caught each
python -m tests.support.mutations MeanFlow    # mutations whose name contains this word
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOFLOW = "soflow_core/objectives/soflow.py"
AVERAGE = "soflow_core/objectives/average_velocity.py"
STEP_TIMES = "soflow_core/objectives/step_times.py"
DERIVATIVE = "soflow_core/objectives/total_derivative.py"
MEANFLOW = "soflow_core/objectives/meanflow.py"
SAMPLING = "soflow_core/objectives/solution_model.py"
IMPROVED = "soflow_core/objectives/improved_meanflow.py"
GUIDANCE = "soflow_core/guidance.py"
TIMES = "soflow_core/times.py"
PASSES = "soflow_core/passes.py"
FLOW_MATCHING = "soflow_core/objectives/flow_matching.py"
DIFFUSION = "soflow_core/objectives/diffusion.py"
CONSISTENCY = "soflow_core/objectives/consistency.py"
ESC = "soflow_core/objectives/esc.py"
PLUG_IN = "soflow_core/plug_in_velocity.py"
ALPHAFLOW = "soflow_core/objectives/alphaflow.py"
SHORTCUT = "soflow_core/objectives/shortcut.py"
OPTIMIZER = "soflow_core/optimizer.py"

# Without test_reference.py: the other tests must catch every mutation by themselves.
TESTS = [
    "test_times.py",
    "test_guidance.py",
    "test_guidance_scale.py",
    "test_guidance_interval.py",
    "test_samplers.py",
    "test_solution_sampling.py",
    "test_soflow.py",
    "test_baselines.py",
    "test_velocity_head.py",
    "test_esc.py",
    "test_plug_in_velocity.py",
    "test_exact_solutions.py",
    "test_recipes.py",
    "test_precision.py",
    "test_optimizer.py",
]


@dataclass(frozen=True)
class Mutation:
    """One text of one file, and what replaces it wherever it stands."""

    name: str
    file: str
    before: str
    after: str
    times: int = 1
    """How often the text stands in the file."""

    @property
    def original(self) -> str:
        """The file as it is now."""
        return (ROOT / self.file).read_text(encoding="utf-8")

    @property
    def mutated(self) -> str:
        """The file with the mutation. Raises SyntaxError: no test of a method finds a fault in a file that nobody can import."""
        text = self.original.replace(self.before, self.after)
        compile(text, self.file, "exec")
        return text


MUTATIONS = [
    Mutation("sign of the inner product", SOFLOW, "torch.sign(start.b) * inner", "inner"),
    Mutation("t and s swapped in the solution", SOFLOW, "x, network(x, t, s, labels)", "x, network(x, s, t, labels)"),
    Mutation(
        "t and s swapped in the coefficients",
        SOFLOW,
        "return PARAMETERIZATIONS.named(self.parameterization)(t, s)",
        "return PARAMETERIZATIONS.named(self.parameterization)(s, t)",
    ),
    Mutation(
        "gradient through the teacher",
        SOFLOW,
        "        with torch.no_grad():\n            x_mid =",
        "        if True:\n            x_mid =",
    ),
    Mutation("gradient through the mixed-in velocity", GUIDANCE, "(1 - mix) * predicted.detach()", "(1 - mix) * predicted"),
    Mutation("weight not detached", SOFLOW, "self._weight(mse.detach())", "self._weight(mse)"),
    Mutation(
        "1 / |b_s| left out of the velocity weight",
        SOFLOW,
        "self._weight(mse.detach()) / coefficients.db_ds.abs()",
        "self._weight(mse.detach())",
    ),
    Mutation("quotient by t - s", SOFLOW, "/ per_row(t - t_mid, x_t)", "/ per_row(t - s, x_t)"),
    Mutation("step to the middle time backwards", SOFLOW, "per_row(t_mid - t, x_t) * velocity", "per_row(t - t_mid, x_t) * velocity"),
    Mutation("teacher asked at t", SOFLOW, "t_mid > s, x_mid, t_mid, s, labels", "t_mid > s, x_mid, t, s, labels"),
    Mutation("teacher at x_t", SOFLOW, "t_mid > s, x_mid, t_mid, s, labels", "t_mid > s, x_t, t_mid, s, labels"),
    Mutation("weight's power doubled", SOFLOW, "** -self.weight_power", "** (-2 * self.weight_power)"),
    Mutation("eps left out of the weight", SOFLOW, "(mse + self.weight_eps)", "(mse + 1e-12)"),
    Mutation(
        "branches averaged, not rows",
        SOFLOW,
        "torch.cat([velocity.loss, consistency.loss]).mean()",
        "velocity.loss.mean() + consistency.loss.mean()",
    ),
    Mutation("labels not dropped", SOFLOW, "labels = drop_labels(labels, dropped)", "pass"),
    Mutation("dropped rows keep the guided target", SOFLOW, "choose_rows(dropped, v_c, guided)", "guided"),
    Mutation("velocity rows not mixed", SOFLOW, "mixed_rows = ~dropped[:first]", "pass"),
    Mutation(
        "guided rows see the sample velocity",
        SOFLOW,
        "guided = guided_velocity(v_c, v[: len(x_t)], strength)",
        "guided = v_c",
    ),
    Mutation("guidance away from the sample", GUIDANCE, "(sample - unconditional)", "(unconditional - sample)"),
    Mutation("guidance of scale w, not w - 1", GUIDANCE, "* (self.scale - 1)", "* self.scale"),
    Mutation("mix the wrong way round", GUIDANCE, "mix * guided + (1 - mix) *", "(1 - mix) * guided + mix *"),
    Mutation("decay below its start", GUIDANCE, "torch.where(t <= decay_from,", "torch.where(t >= decay_from,"),
    Mutation("middle time from s", TIMES, "t + (s - t) * ratio", "s + (t - s) * ratio"),
    Mutation("s and t not kept apart", TIMES, "torch.minimum(end, t - gap)", "torch.minimum(end, t)"),
    Mutation("cosine without its half", "soflow_core/schedule_shapes.py", "0.5 * (1 + math.cos", "1.0 * (1 + math.cos"),
    Mutation("MeanFlow: sign of the derivative", AVERAGE, "velocity[first:] - gap * derivative", "velocity[first:] + gap * derivative"),
    Mutation("MeanFlow: gap left out", AVERAGE, "velocity[first:] - gap * derivative", "velocity[first:] - derivative"),
    Mutation(
        "MeanFlow: tangent of t left out",
        PASSES,
        "make_dual(t, torch.ones_like(t))",
        "make_dual(t, torch.zeros_like(t))",
    ),
    Mutation(
        "MeanFlow: tangent of x left out",
        PASSES,
        "make_dual(x, velocity)",
        "make_dual(x, torch.zeros_like(velocity))",
    ),
    Mutation(
        "MeanFlow: derivative along the sample velocity",
        MEANFLOW,
        "differential_target(passes, start, velocity,",
        "velocity - v_c + differential_target(passes, start, v_c,",
    ),
    Mutation("MeanFlow: weight with gradient", MEANFLOW, "total.detach() + self.weight_eps", "total + self.weight_eps"),
    Mutation("MeanFlow: mean for sum in the weight", MEANFLOW, "total = row_sum(squares)", "total = row_mean(squares)"),
    Mutation(
        "MeanFlow: own velocity of the wrong label",
        AVERAGE,
        "start.labels[first:]])\n",
        "null_labels(len(x) - len(start.x), x.device)])\n",
    ),
    Mutation("MeanFlow: dropped rows guided", AVERAGE, "guidance.inside(start.t) & ~keep_sample", "guidance.inside(start.t)"),
    Mutation("MeanFlow: window ignored", AVERAGE, "guidance.inside(start.t) & ~keep_sample", "~keep_sample"),
    Mutation("MeanFlow: kappa missing from v_u", GUIDANCE, "(1 - self.omega - self.kappa)", "(1 - self.omega)"),
    Mutation("MeanFlow: t and s swapped", AVERAGE, "    return t, s\n", "    return s, t\n"),
    Mutation("MeanFlow: step the wrong way", AVERAGE, "return x - per_row(t - s, x)", "return x + per_row(t - s, x)"),
    Mutation("derivative: tangent left out", AVERAGE, "(velocity if tangent is None else tangent)", "velocity"),
    Mutation(
        "difference: x stands still",
        PASSES,
        "x + per_row(time - t, x) * velocity for time",
        "x + 0 * per_row(time - t, x) * velocity for time",
    ),
    Mutation("difference: backwards", PASSES, "(ahead - behind)", "(behind - ahead)"),
    Mutation("difference: one-sided", PASSES, "torch.maximum(t - difference, s)", "torch.maximum(t - 1e-9 * difference, s)"),
    Mutation("difference: below s", PASSES, "torch.maximum(t - difference, s)", "t - difference"),
    Mutation("difference: beyond the noise", PASSES, "(t + difference).clamp(max=1)", "t + difference"),
    Mutation("difference: divided by its half", PASSES, "per_row(later - earlier, x)", "per_row(later - t, x)"),
    Mutation("difference: in low precision", PASSES, "values = self.high_precision(", "values = self.low_precision("),
    Mutation("difference: setting ignored", DERIVATIVE, 'None if self.derivative == "jvp" else self.difference', "None"),
    Mutation(
        "improved MeanFlow: along the target's velocity",
        IMPROVED,
        "self.total_derivative, own)",
        "self.total_derivative, velocity)",
    ),
    Mutation("improved MeanFlow: w for 1 - 1/w", GUIDANCE, "(1 - 1 / self.scale) *", "(self.scale - 1) *"),
    Mutation("improved MeanFlow: guided away", GUIDANCE, "(predicted - unconditional)", "(unconditional - predicted)", times=2),
    Mutation("improved MeanFlow: interval ignored", IMPROVED, "use = inside & ~dropped", "use = ~dropped"),
    Mutation(
        "improved MeanFlow: own velocity in the interval of its row",
        IMPROVED,
        "self.guidance.of_velocity(start.scale, inside)[first:]",
        "start.scale[first:]",
    ),
    Mutation(
        "improved MeanFlow: own velocity guided outside", GUIDANCE, "torch.where(inside, condition[:, 0], 1.0)", "condition[:, 0]"
    ),
    Mutation("improved MeanFlow: own velocity at s", IMPROVED, "rows, x, t, t, labels, scale)", "rows, x, t, 0.5 * t, labels, scale)"),
    Mutation(
        "improved MeanFlow: own velocity of the wrong rows",
        IMPROVED,
        "velocities[count:] if guided",
        "velocities[first:count] if guided",
    ),
    Mutation("improved MeanFlow: weight with gradient", IMPROVED, "total.detach() + self.weight_eps", "total + self.weight_eps"),
    Mutation("improved MeanFlow: mean for sum", IMPROVED, "total = row_sum(squares)", "total = row_mean(squares)"),
    Mutation(
        "improved MeanFlow: own velocity of the first head",
        IMPROVED,
        '"velocity" if self.velocity_head',
        '"average" if self.velocity_head',
    ),
    Mutation(
        "improved MeanFlow: second head untrained",
        IMPROVED,
        "loss + self._weighted(head_squares)",
        "loss + 0 * self._weighted(head_squares)",
    ),
    Mutation(
        "recipe: improved MeanFlow's share of Flow Matching",
        IMPROVED,
        "flow_matching_share: float = 0.5",
        "flow_matching_share: float = 0.75",
    ),
    Mutation("recipe: improved MeanFlow's times near the noise", IMPROVED, "LogitNormal(-0.4, 1.0)", "LogitNormal(0.4, 1.0)"),
    Mutation("precision: improved MeanFlow", IMPROVED, "low_precision(*arguments), None", "high_precision(*arguments), None"),
    Mutation("scale: improved MeanFlow's v_u at w", IMPROVED, "at_all_times(torch.ones_like(start.t), scale)", "start.scale"),
    Mutation("scale: improved MeanFlow's derivative at 1", AVERAGE, "labels), along, scale)", "labels), along, None)"),
    Mutation("scale: sampled without", SAMPLING, "= at_scale(network, scale, noise, self.sampled_interval)", "= network"),
    Mutation("sampling: times of another number of steps", STEP_TIMES, "steps == len(self.sampling_times) + 1", "steps > 1"),
    Mutation("sampling: own sampler only", SAMPLING, "self.sampler or self.own_sampler", "self.own_sampler"),
    Mutation("sampling: consistency on the linear path", SOFLOW, "return PATHS.named(self.path)\n", "return PATHS.named('linear')\n"),
    Mutation("sampling: MeanFlow by consistency", AVERAGE, 'ClassVar[str] = "ode"', 'ClassVar[str] = "consistency"'),
    Mutation("sampling: rising times", "soflow_core/samplers/grids.py", "if any(end >= start", "if any(end == start"),
    Mutation("sampling: Shortcut off its grid", SHORTCUT, "not in sizes or start % (start - end)", "not in sizes"),
    Mutation("scale: uniform", GUIDANCE, "self.low * (self.high / self.low) ** source", "self.low + (self.high - self.low) * source"),
    Mutation("scale: dropped rows have one", GUIDANCE, "torch.where(dropped, 1.0, scale", "torch.where(dropped & False, 1.0, scale"),
    Mutation("scale: unconditional velocity at w", SOFLOW, "torch.ones_like(draws.scale), draws", "draws.scale, draws"),
    Mutation("scale: of the wrong rows", SOFLOW, "scale[:first], scale[first:]", "scale[:first], scale[: len(scale) - first]"),
    Mutation("scale: none where f_l is asked", SOFLOW, "t_mid, s, labels, scale", "t_mid, s, labels, None"),
    Mutation("scale: embedding of w", "soflow_core/networks/dit.py", "else 1 - 1 / w", "else w"),
    Mutation("recipe: SoFlow guided by w = 2", GUIDANCE, "ScaleRange = 3.0", "ScaleRange = 2.0"),
    Mutation("recipe: SoFlow's guidance decays from 0.6", GUIDANCE, "decay_from: float = 0.8", "decay_from: float = 0.6"),
    Mutation("recipe: MeanFlow's times near the noise", MEANFLOW, "LogitNormal(-0.4, 1.0)", "LogitNormal(0.4, 1.0)"),
    Mutation("recipe: MeanFlow's eps", MEANFLOW, "weight_eps: float = 0.01", "weight_eps: float = 1.0"),
    Mutation("ESC: images in the wrong direction", PLUG_IN, "* rows - weights @ others", "* rows + weights @ others"),
    Mutation("ESC: images at their distances, not along the noise", PLUG_IN, "ratio * along + ", ""),
    Mutation("ESC: distances not halved", PLUG_IN, "(ratio * distance).square() / 2", "(ratio * distance).square()"),
    Mutation("ESC: as likely by the nearness of the noise", PLUG_IN, "((1 - t) / t)", "(1 / t)"),
    Mutation("ESC: not divided by t", PLUG_IN, "away.reshape(x0.shape) / per_row(t, x0)", "away.reshape(x0.shape)"),
    Mutation("ESC: images of other labels", PLUG_IN, ".masked_fill(~allowed, -torch.inf)", ""),
    Mutation("ESC: plug-in velocity everywhere", ESC, "draws.plugged, plug_in", "draws.plugged | True, plug_in"),
    Mutation("ESC: dropped rows see their label alone", ESC, " | dropped[:, None]", ""),
    Mutation("ESC: images of the part alone", ESC, "whole = batch if batch.whole is None else batch.whole", "whole = batch"),
    Mutation("ESC: all rows to zero", ESC, "torch.where(draws.chance[first:] < zero_share, 0, s[first:])", "0 * s[first:]"),
    Mutation("ESC: steps to zero last", ESC, "math.acos(step / self.zero_steps)", "math.asin(step / self.zero_steps)"),
    Mutation("ESC: derivative at once", ESC, ', factor=scheduled["warmup"]', ""),
    Mutation("ESC: derivative without the factor", AVERAGE, "per_row(factor * (t - s)", "per_row((t - s)"),
    Mutation("ESC: S for its square", ESC, "row_sum(squares).square()", "row_sum(squares)"),
    Mutation("ESC: weight with gradient", ESC, "total.detach() + self.weight_eps", "total + self.weight_eps"),
    Mutation("recipe: ESC's times near the noise", ESC, "LogitNormal(-0.4, 1.0)", "LogitNormal(0.4, 1.0)"),
    Mutation("recipe: ESC's share of Flow Matching", ESC, "flow_matching_share: float = 0.75", "flow_matching_share: float = 0.5"),
    Mutation("recipe: ESC's guidance", ESC, "omega=1.0, kappa=0.5", "omega=1.0, kappa=0.0"),
    Mutation("recipe: alpha-Flow's times near the noise", ALPHAFLOW, "LogitNormal(-0.4, 1.0)", "LogitNormal(0.4, 1.0)"),
    Mutation("recipe: alpha-Flow's eps", ALPHAFLOW, "weight_eps: float = 1e-3", "weight_eps: float = 1e-1"),
    Mutation(
        "recipe: alpha-Flow's share of Flow Matching",
        ALPHAFLOW,
        "flow_matching_share: float = 0.25",
        "flow_matching_share: float = 0.5",
    ),
    Mutation("recipe: sCM's times near the noise", CONSISTENCY, "LogitNormal(-1.0, 1.4)", "LogitNormal(1.0, 1.4)"),
    Mutation("recipe: Shortcut's teacher", SHORTCUT, "teacher_ema: float = 0.999", "teacher_ema: float = 0.9"),
    Mutation("recipe: Shortcut's guidance", SHORTCUT, "scale: float = 1.5", "scale: float = 4.0"),
    Mutation("recipe: diffusion's dropped labels", DIFFUSION, "drop: float = 0.1", "drop: float = 0.3"),
    Mutation("recipe: Adam's betas", OPTIMIZER, "(0.9, 0.99)", "(0.9, 0.999)"),
    Mutation("no weight decay", OPTIMIZER, '"weight_decay": self.weight_decay', '"weight_decay": 0.0'),
    Mutation(
        "Flow Matching: times of the nearer half",
        FLOW_MATCHING,
        "source.uniform() if",
        "0.5 * source.uniform() if",
    ),
    Mutation(
        "diffusion: step numbers of the first half",
        DIFFUSION,
        "source.integers(self.diffusion_steps)",
        "source.integers(self.diffusion_steps // 2)",
    ),
    Mutation(
        "DDPM: variance of the forward step",
        "soflow_core/samplers/diffusion.py",
        "((1 - abar_next) / (1 - abar) * beta) ** 0.5",
        "beta**0.5",
    ),
    Mutation(
        "Shortcut: step sizes by the row's number alone",
        SHORTCUT,
        "row + source.common_integer(levels)",
        "row - velocity_rows",
    ),
    Mutation(
        "precision: times under autocast",
        "soflow_core/networks/dit.py",
        "with torch.autocast(t.device.type, enabled=False):",
        "if True:",
    ),
    Mutation(
        "precision: SoFlow's guidance",
        SOFLOW,
        "passes.forward_where(passes.low_precision,",
        "passes.forward_where(passes.high_precision,",
    ),
    Mutation("precision: MeanFlow", MEANFLOW, "passes.low_precision(x_t", "passes.high_precision(x_t"),
    Mutation("precision: alpha-Flow", ALPHAFLOW, "passes.high_precision", "passes.low_precision", times=2),
    Mutation("precision: iCT and ECT", CONSISTENCY, "passes.high_precision", "passes.low_precision", times=2),
    Mutation(
        "precision: Flow Matching",
        FLOW_MATCHING,
        "Passes(network, policy).low_precision",
        "Passes(network, policy).high_precision",
    ),
]  # fmt: skip


NOTHING = Mutation("nothing", SOFLOW, "", "")


def run(mutation: Mutation, most: int = 3) -> list[str]:
    """Names of tests that fail on this mutation, up to `most`; a failing import counts as one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("soflow_core", "tests/core", "tests/support", "tests/reference", "benchmarks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "docs").mkdir()
        for name in ("pyproject.toml", "tests/__init__.py", "docs/methods.md"):
            shutil.copy(ROOT / name, copy / name)
        (copy / mutation.file).write_text(mutation.mutated, encoding="utf-8")
        tests = [str(copy / "tests/core" / name) for name in TESTS]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--tb=no",
            "-q",
            f"--maxfail={most}",
            "-m",
            "not slow",
            *tests,
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        return re.findall(r"^(?:FAILED|ERROR) \S*?(test_\S+)", result.stdout, flags=re.MULTILINE)


def main(word: str = "") -> int:
    """Prints a table row for each mutation. Returns the number that no test caught, the exit code."""
    if red := run(NOTHING):
        print(f"the tests are red before anything is broken: {red}")
        return 1
    missed = 0
    print("| mutation | caught by |\n|---|---|")
    for mutation in MUTATIONS:
        if word in mutation.name:
            caught = run(mutation)
            missed += not caught
            names = dict.fromkeys(re.sub(r"^test_\w+\.py::|\[.*", "", name) for name in caught)
            print(f"| {mutation.name} | {', '.join(names) or '**nothing**'} |", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
