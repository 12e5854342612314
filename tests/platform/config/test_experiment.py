"""A sweep file is checked before anything starts, and what is wrong with it is refused in one sentence with file and line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.dataset import expected
from soflow_platform.training.model import describe_network, network_config
from soflow_platform.tuning.record import load_record, new_or_resumed_record, sweep_id
from soflow_platform.tuning.search_space import trials
from tests.support.sweep_files import MINIMAL, write

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "sweeps" / "digits.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        trials(*reversed(read_experiment(path, overrides)))
    return str(caught.value)


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "sweeps").glob("*.yaml")])
def test_the_sweeps_that_come_with_the_package_are_valid(name: str) -> None:
    experiment, document = read_experiment(ROOT / "sweeps" / f"{name}.yaml")
    assert len(trials(document, experiment)) >= 3


@pytest.mark.parametrize(
    ("name", "steps"),
    [("b4", 400_000), ("b2", 1_200_000), ("m2", 1_200_000), ("l2", 1_200_000), ("xl2", 1_200_000)],
)
def test_the_sizes_of_imagenet_have_the_papers_recipe(name: str, steps: int) -> None:
    experiment, document = read_experiment(ROOT / "sweeps" / f"{name}.yaml")
    objective, guidance = experiment.objective, experiment.objective.guidance
    assert (experiment.network.size or "").replace("/", "").lower() == name
    assert (experiment.training.steps, experiment.training.batch) == (steps, 256)
    assert experiment.training.ema == (0.9999,)
    assert experiment.training.clip_norm is None
    assert (experiment.optimizer.name, experiment.optimizer.lr) == ("adamw", 1e-4)
    assert (experiment.optimizer.betas, experiment.optimizer.weight_decay) == ((0.9, 0.99), 0.0)
    assert (objective.flow_matching_share, objective.weight_power, objective.weight_eps) == (0.75, 1.0, 0.01)
    assert (guidance.scale, guidance.mix, guidance.drop, guidance.decay_from) == (3.0, 0.25, 0.1, 0.8)
    times = [(d.mean, d.std) for d in (objective.times.velocity, objective.times.end, objective.times.start)]
    assert times == [(-0.2, 1.0), (-1.0, 0.8), (0.2, 0.8)]
    schedule = objective.schedule
    assert (schedule.kind, schedule.initial, schedule.final) == ("exponential", 0.1, 0.002)
    assert (experiment.search.metric, experiment.evaluation.nfe) == ("eval/fid_nfe1", (1, 2))
    assert experiment.search.space.keys() >= VARIED
    paper, *others = trials(document, experiment)
    assert (paper.name, paper.settings) == ("trial-00-paper", {})
    assert len(others) == experiment.search.trials


VARIED = {
    "objective.flow_matching_share",
    "objective.guidance.mix",
    "objective.guidance.scale",
    "objective.weight_power",
    "objective.weight_eps",
    *(f"objective.schedule.{end}" for end in ("kind", "initial", "final")),
    *(f"objective.times.{time}.{part}" for time in ("velocity", "start", "end") for part in ("mean", "std")),
}


def test_cifar10_is_the_papers_recipe_but_for_the_network() -> None:
    experiment, _ = read_experiment(ROOT / "sweeps" / "cifar10.yaml")
    objective, schedule = experiment.objective, experiment.objective.schedule
    assert (experiment.training.steps, experiment.training.batch, experiment.data.conditional) == (
        800_000,
        1024,
        False,
    )
    assert (experiment.optimizer.name, experiment.optimizer.lr, experiment.optimizer.betas) == (
        "radam",
        1e-4,
        (0.9, 0.999),
    )
    assert (objective.flow_matching_share, objective.weight_power, objective.weight_eps) == (0.0, 0.75, 0.001)
    times = [(d.mean, d.std) for d in (objective.times.velocity, objective.times.end, objective.times.start)]
    assert times == [(-0.9, 1.6), (-4.0, 1.6), (-0.9, 1.6)]
    assert (schedule.kind, schedule.initial, schedule.final) == ("exponential", 1.0, 1 / 3200)
    assert not objective.guidance.active


def test_cifar10_with_the_u_net_differs_in_network_average_and_augmentation_alone() -> None:
    (with_dit, _), (with_unet, _) = (
        read_experiment(ROOT / "sweeps" / f"{name}.yaml") for name in ("cifar10", "cifar10-unet")
    )
    network = with_unet.network.architecture(channels=3, height=32, width=32)
    assert (network.kind, network.dropout, network.augmentations) == ("unet", 0.3, 6)
    assert network.parameters() == pytest.approx(55.93e6, abs=5e3)
    assert (with_unet.training.ema_every, with_unet.training.augment) == (16, 0.12)
    assert with_unet.objective == with_dit.objective
    assert with_unet.optimizer == with_dit.optimizer
    settings = [
        trial.training.model_dump(exclude={"ema_every", "augment"}) for trial in (with_dit, with_unet)
    ]
    assert settings[0] == settings[1]


def test_augmentation_needs_its_labels_and_a_teacher_every_step(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    needed = "training.augment gives the network 6 labels and it knows 0: set network.augmentations to 6"
    assert needed in refusal(path, "training.augment=0.1")
    teacher = refusal(path, "training.ema_every=16", "objective={method: shortcut}")
    assert "shortcut has a teacher, averaged every step: set it to 1" in teacher


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_known_name(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("batch: 16", "bacth: 16"))
    assert refusal(path) == f"{path}, line 5: unknown key `bacth` in `training`; did you mean `batch`?"


def test_a_misspelt_key_deep_in_the_objective_is_found(tmp_path: Path) -> None:
    text = MINIMAL.replace("{method: soflow}", "\n  method: soflow\n  guidance:\n    scael: 3.0")
    sentence = refusal(write(tmp_path, text))
    assert "line 7: unknown key `scael` in `objective.guidance`; did you mean `scale`?" in sentence


def test_a_misspelt_override_is_named_as_one(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), "training.stepps=10")
    assert sentence == "--set training.stepps: unknown key `stepps` in `training`; did you mean `steps`?"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 40", "steps: many", "line 5: `training.steps` is 'many': input should be a valid integer"),
        ("steps: 40", "steps: 0", "line 5: `training.steps` is 0: input should be greater than 0"),
        (
            "method: soflow",
            "method: so-flow",
            "line 4: unknown method 'so-flow' in `objective`; known are alphaflow",
        ),
        (
            "method: soflow",
            "flow_matching_share: 0.5",
            "line 4: `objective.method` is missing; known are alphaflow",
        ),
        ("every: 20", "every: 50", "evaluation.every (50) is beyond training.steps (40): lower it"),
        ("heads: 2", "heads: 3", "`hidden` (32) must be a multiple of `heads` (3)"),
        ("heads: 2", "size: S/2", "give either `size` (such as XL/2) or all of"),
        ("name: small", "name: Small Sweep", "line 1: `name` is 'Small Sweep'"),
        ("training: {steps: 40, batch: 16}\n", "", "`training` is missing"),
        ("steps: 40", "steps: [40", "line 5: "),
        ("steps: 40", "steps: 40, steps: 50", "line 5: `steps` is given twice; keep one"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    sentence = refusal(write(tmp_path, MINIMAL.replace(old, new)))
    assert message in sentence
    assert "\n" not in sentence


def test_a_batch_that_does_not_divide_names_both_numbers(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), "resources.workers=3")
    assert "training.batch (16) does not divide over 3 worker(s)" in sentence


def test_a_batch_that_does_not_divide_names_the_workers_that_it_does(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), "resources.workers=6", "training.accumulate=2")
    assert "over 6 worker(s) in 2 pieces each" in sentence
    assert sentence.endswith("or workers of 1, 2, 4, 8.")


def test_a_short_trial_of_a_long_recipe_needs_no_other_setting(tmp_path: Path) -> None:
    experiment, _ = read_experiment(write(tmp_path, MINIMAL), ("training.checkpoint_every=10_000",))
    assert experiment.training.checkpoint_every == 10_000


def test_min_workers_needs_no_divisible_batch_where_rows_may_be_uneven(tmp_path: Path) -> None:
    path, elastic = write(tmp_path, MINIMAL), "resources={workers: 8, min_workers: 4}"
    assert read_experiment(path, (elastic,))[0].resources.min_workers == 4
    assert "does not divide over 5 worker(s)" in refusal(path, elastic, "training.parallel=fsdp")
    assert "does not divide over 5 worker(s)" in refusal(path, elastic, "training.accumulate=2")
    # A method that compares the images of all workers.
    assert "does not divide over 5 worker(s)" in refusal(path, elastic, "objective={method: esc}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.ema=[0.5, 0.9, 0.5]", "`training.ema`: 0.5 is given twice: keep one"),
        ("optimizer.warmup_steps=41", "optimizer.warmup_steps (41) is beyond training.steps (40): lower it"),
        (
            "search.asha={first_rung: 41}",
            "search.asha.first_rung (41) is beyond training.steps (40): lower it",
        ),
        (
            "training.graphs=true",
            "training.graphs records the work of a GPU, and a worker has none: raise resources.gpus_per_worker above 0, or leave",
        ),
        ("training.parallel=fsdp", "fsdp shares a network among workers: raise resources.workers above 1"),
        (
            "training.checkpoints=gs://bucket/x",
            "`training.checkpoints`: gs:// cannot be written: give a folder or s3",
        ),
        ("training.checkpoints=https://host/x", "https:// cannot be written"),
        ("training.checkpoints=s3://", "s3:// names no bucket: give s3://bucket/prefix"),
        ("training.checkpoints=s3:///prefix", "s3:///prefix names no bucket"),
        (
            "tracking.uri=./mlruns",
            "`tracking.uri`: ./mlruns is no tracking server: give http://HOST:PORT or sqlite:///FILE",
        ),
        ("tracking.uri=file:///mlruns", "file:///mlruns is no tracking server"),
        ("tracking.uri=sqlite://", "sqlite:// names no file"),
        ("training.grace_seconds=0", "`training.grace_seconds` is 0"),
    ],
)
def test_what_would_fail_later_is_refused_now(tmp_path: Path, override: str, message: str) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), override)
    assert message in sentence
    assert "\n" not in sentence


def test_places_are_the_same_from_every_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, MINIMAL)
    monkeypatch.chdir(tmp_path)
    relative = ("training.checkpoints=kept", "tracking.uri=sqlite:///runs.db")
    experiment, _ = read_experiment(path, relative)
    assert experiment.training.checkpoints == str(tmp_path / "kept")
    assert experiment.tracking.uri == f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.chdir("/")
    assert Experiment(**experiment.resolved()) == experiment
    for place in ("s3://bucket/prefix?region=x", "s3://bucket"):
        assert read_experiment(path, (f"training.checkpoints={place}",))[0].training.checkpoints == place


def test_a_metric_that_is_never_reported_is_refused_with_those_that_are(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), "search.metric=eval/fid")
    assert (
        "search.metric 'eval/fid' is never reported: this sweep reports eval/fd_nfe1, eval/fd_nfe2"
        in sentence
    )


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "absent.yaml cannot be read: No such file or directory" in refusal(tmp_path / "absent.yaml")


def test_a_child_file_overrides_what_it_extends_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    child = write(tmp_path, "extends: base.yaml\ntraining: {steps: 80, ema: [0.5]}\n", "child.yaml")
    experiment, _ = read_experiment(child)
    assert (experiment.training.steps, experiment.training.batch, experiment.training.ema) == (80, 16, (0.5,))


def test_an_error_in_an_extended_file_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL.replace("batch", "bacth"), "base.yaml")
    sentence = refusal(write(tmp_path, "extends: base.yaml\ntraining: {steps: 80}\n", "child.yaml"))
    assert "base.yaml, line 5: unknown key `bacth`" in sentence


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "`extends` goes in a circle: a.yaml -> b.yaml -> a.yaml" in refusal(tmp_path / "a.yaml")


def test_numbers_in_exponent_form_are_numbers(tmp_path: Path) -> None:
    experiment, _ = read_experiment(write(tmp_path, MINIMAL + "optimizer: {lr: 1e-3}\n"))
    assert experiment.optimizer.lr == 1e-3


def test_a_grid_tries_every_combination_and_names_each(tmp_path: Path) -> None:
    space = "{objective.weight_power: [0.5, 1.0], objective.schedule.final: [0.002, 0.01]}"
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (f"search.space={space}",))
    points = trials(document, experiment)
    assert [p.name for p in points] == [
        "trial-00-weight_power=0.5-final=0.002",
        "trial-01-weight_power=0.5-final=0.01",
        "trial-02-weight_power=1-final=0.002",
        "trial-03-weight_power=1-final=0.01",
    ]
    assert points[3].experiment.objective.weight_power == 1.0
    assert points[3].experiment.objective.schedule.final == 0.01


def test_random_trials_are_the_same_each_time_and_inside_their_range(tmp_path: Path) -> None:
    space = "search.space={optimizer.lr: {log_uniform: [1e-4, 1e-2]}}"
    overrides = (space, "search.algorithm=random", "search.trials=20")
    first, second = (
        [p.settings["optimizer.lr"] for p in trials(document, experiment)]
        for experiment, document in (read_experiment(write(tmp_path, MINIMAL), overrides) for _ in range(2))
    )
    assert first == second
    assert len(set(first)) == 20
    assert all(1e-4 <= lr <= 1e-2 for lr in first)


def test_listed_points_come_first_and_one_that_the_grid_has_too_is_trained_once(tmp_path: Path) -> None:
    first = (
        "[{}, {name: paper, objective.weight_power: 0.5, optimizer.lr: 1e-3}, {objective.weight_power: 2.0}]"
    )
    overrides = (
        f"search.first={first}",
        "search.space={objective.weight_power: [0.5, 1.0]}",
        "objective.weight_power=1.0",
    )
    experiment, document = read_experiment(write(tmp_path, MINIMAL), overrides)
    points = trials(document, experiment)
    assert [(p.name, p.settings) for p in points] == [
        ("trial-00-as-written", {}),
        ("trial-01-paper", {"objective.weight_power": 0.5, "optimizer.lr": 1e-3}),
        ("trial-02-weight_power=2", {"objective.weight_power": 2.0}),
        ("trial-03-weight_power=0.5", {"objective.weight_power": 0.5}),
    ]
    assert points[1].experiment.optimizer.lr == 1e-3
    both = trials(
        *reversed(
            read_experiment(write(tmp_path, MINIMAL), (*overrides, "search.budgets=[steps, evaluations]"))
        )
    )
    assert [p.budgets for p in both] == [("steps", "evaluations")] * 4


def test_without_a_space_the_listed_points_are_the_sweep(tmp_path: Path) -> None:
    experiment, document = read_experiment(
        write(tmp_path, MINIMAL), ("search.first=[{optimizer.lr: 1e-4}, {optimizer.lr: 1e-3}]",)
    )
    assert [p.name for p in trials(document, experiment)] == ["trial-00-lr=0.0001", "trial-01-lr=0.001"]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("[{objective.weight_power: -1.0}]", "--set search.first (search.first objective.weight_power)"),
        ("[{}, {wieght: 1}]", "unknown key `wieght`; known are"),
        ("[{resources.workers: 2}]", "`resources.workers` cannot vary between trials"),
        ("[{name: a/b}]", "a name in `first` is up to 60 letters, digits"),
        ("[{name: a}, {name: a, optimizer.lr: 1e-4}]", "`first` has two points of the name 'a': rename one"),
    ],
)
def test_a_listed_point_that_cannot_be_trained_is_refused(tmp_path: Path, first: str, message: str) -> None:
    assert message in refusal(write(tmp_path, MINIMAL), f"search.first={first}")


def test_a_value_of_the_search_space_is_checked_like_one_in_the_file(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), "search.space={objective.weight_power: [1.0, -1.0]}")
    assert "weight_power is -1" in sentence


def test_an_unknown_setting_in_the_search_space_is_refused(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), "search.space={objective.wieght_power: [1.0]}")
    assert "unknown key `wieght_power` in `objective`; did you mean `weight_power`?" in sentence


def test_the_resolved_settings_read_back_to_the_same_experiment() -> None:
    experiment, _ = read_experiment(DIGITS)
    again = Experiment(**experiment.resolved())
    assert again == experiment
    assert again.digest() == experiment.digest()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data.conditional=false",
        "network.depth=2",
        "objective.guidance.scale=2.0",
        "optimizer.lr=2e-3",
        "training.steps=601",
        "training.batch=64",
        "training.ema=[0.9]",
        "training.precision=mixed",
        "training.clip_norm=1.0",
        "training.class_run=4",
        "evaluation.samples=1000",
        "sampling.grid=power",
        "search.space={objective.weight_power: [0.5]}",
        "search.first=[{}]",
    ],
)
def test_what_decides_the_numbers_makes_another_sweep(override: str) -> None:
    assert read_experiment(DIGITS, (override,))[0].digest() != read_experiment(DIGITS)[0].digest()


def test_settings_of_the_search_that_came_later_leave_a_sweep_its_digest() -> None:
    """Computed before there were any."""
    assert read_experiment(DIGITS)[0].digest() == "3ad9da3a"
    drawn = "search={algorithm: random, trials: 3, space: {optimizer.lr: {log_uniform: [1e-4, 1e-2]}}}"
    assert read_experiment(DIGITS, (drawn,))[0].digest() == "f00399de"


@pytest.mark.parametrize(
    "override",
    [
        "resources={workers: 2, min_workers: 1, cpus_per_worker: 0.5, concurrent_trials: 1, max_failures: 9, wait_minutes: 1}",
        "training.parallel=fsdp",
        "training.accumulate=2",
        "training.log_every=10",
        "training.checkpoint_every=10",
        "training.keep_checkpoints=5",
        "training.checkpoints=/elsewhere",
        "training.patience_minutes=60",
        "training.grace_seconds=60",
        "tracking.uri=http://tracking:5000",
        "registry.enabled=false",
        "description=in other words",
        "comparison=[{steps: [1]}]",
        "sampling.steps=4",
    ],
)
def test_what_only_runs_a_sweep_may_change_while_it_stays_the_same(override: str) -> None:
    overrides = ("resources.workers=2", override)
    assert read_experiment(DIGITS, overrides)[0].digest() == read_experiment(DIGITS)[0].digest()


@pytest.mark.parametrize(
    ("method", "digest"),
    [("soflow", "64f4af04"), ("meanflow", "becaa66d"), ("alphaflow", "8cdcb10a")],
)
def test_settings_that_methods_got_later_leave_the_ids_of_older_sweeps(method: str, digest: str) -> None:
    """The digests are those that version 0.1.0 computes."""
    override = f"objective={{method: {method}}}"
    older = Path(__file__).parents[2] / "compatibility" / "version_0_1" / "stopped.yaml"
    assert read_experiment(older, (override,))[0].digest() == digest


def test_a_setting_that_a_method_got_later_makes_another_sweep_where_it_acts() -> None:
    overrides = [(f"objective={{method: meanflow, difference: {value}}}",) for value in (0.005, 0.01)]
    digests = {read_experiment(DIGITS, override)[0].digest() for override in overrides}
    assert len(digests) == 2


def test_a_sweep_started_again_keeps_its_runs_and_takes_new_settings(
    tmp_path: Path,
) -> None:
    storage = ProjectFolder(tmp_path)
    first, document = read_experiment(DIGITS)
    sweep = sweep_id(storage, first, again=False)
    begun = new_or_resumed_record(None, sweep, "digits.yaml", first, trials(document, first))
    begun.run, begun.attempts = "a-run", 1
    begun.save(storage)
    second, document = read_experiment(DIGITS, ("resources.workers=2",))
    points = trials(document, second)
    assert sweep_id(storage, second, again=False) == sweep
    new_or_resumed_record(load_record(storage, sweep), sweep, "digits.yaml", second, points).save(storage)
    kept = load_record(storage, sweep)
    assert kept is not None
    assert (kept.run, kept.attempts, kept.created) == ("a-run", 1, begun.created)
    assert kept.experiment["resources"]["workers"] == 2
    assert {point.experiment.resources.workers for point in points} == {2}
    assert kept.trials == begun.trials


def test_a_class_count_may_be_left_to_the_data() -> None:
    path = ROOT / "sweeps" / "xl2.yaml"
    experiment, document = read_experiment(path, ("data.classes=null",))
    for trial in trials(document, experiment):
        data = expected(trial.experiment)
        assert data is not None
        assert data.classes is None
        assert describe_network(trial.experiment, data).width == 32
    latents = DatasetInfo(
        kind="latents",
        shape=(4, 32, 32),
        dtype="float16",
        classes=1000,
        autoencoder=experiment.data.autoencoder,
        scaling=experiment.data.scaling,
    )
    assert network_config(experiment, latents).null_label
    with pytest.raises(UserError, match="holds no labels"):
        network_config(experiment, replace(latents, classes=None))
    in_runs = read_experiment(path, ("data.classes=null", "data.conditional=false", "training.class_run=32"))[
        0
    ]
    with pytest.raises(UserError, match=r"training.class_run .* holds no labels: set it to 1"):
        network_config(in_runs, replace(latents, classes=None))


def test_settings_that_evaluation_has_got_since_leave_older_sweeps_their_digest(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    own = read_experiment(path)[0].digest()
    assert read_experiment(path, ("evaluation.final_samples=100",))[0].digest() == own
    assert read_experiment(path, ("evaluation.reference=elsewhere",))[0].digest() != own


def test_graphs_are_refused_where_the_host_has_a_part_in_each_step(tmp_path: Path) -> None:
    path, gpu = write(tmp_path, MINIMAL), "resources.gpus_per_worker=1"
    assert read_experiment(path, (gpu, "training.graphs=true"))[0].training.graphs
    for override, sentence in {
        "resources.workers=2": "records the passes of one worker, and resources.workers is 2: set it to 1",
        "network={kind: unet, dropout: 0.1}": "does not go with network.dropout: leave it out",
    }.items():
        assert f"training.graphs {sentence}" in refusal(path, gpu, "training.graphs=true", override)


def test_recompute_is_refused_where_blocks_cannot_be_run_again(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert read_experiment(path, ("training.recompute=true",))[0].training.recompute
    for override, sentence in (
        ("objective={method: meanflow}", "does not go with meanflow, whose Jacobian-vector product"),
        ("network={kind: unet}", "runs the blocks of a network again, which the kind unet has none of"),
    ):
        assert f"training.recompute {sentence}" in refusal(path, "training.recompute=true", override)
