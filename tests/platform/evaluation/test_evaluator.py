"""Evaluation during training, on any feature network: its scores, tags and flags, and that it does not disturb the training."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_core.failures import InputError
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Objective, SoFlow
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.preparation.build import prepare_locally
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.references.reference_store import DECODED_LATENTS
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.config.evaluation import EvaluationConfig
from soflow_platform.evaluation.evaluator import Comparison, Evaluation, Evaluator, Interrupted, grid_image
from soflow_platform.evaluation.ranks import SingleProcess
from soflow_platform.generation.decoding import decode_samples
from soflow_platform.generation.sampling import generate
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.metric_logger import MetricLogger
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.trial_log import LOG
from soflow_platform.training.worker import Trainer
from tests.support.small_networks import exported
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]


@pytest.fixture(scope="module")
def thumbnail(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(tmp_path_factory.mktemp("thumbnail"), 1, 8)


def test_weights_with_and_without_evaluation_are_equal_bit_for_bit(worker: Make, thumbnail: str) -> None:
    features = f"evaluation.features={thumbnail}"
    states, generators = [], []
    for name, every in (("often", 2), ("once", 6)):
        trained = worker(name, f"evaluation.every={every}", features)
        trained.run()
        states.append(final_state(str(trained.setup.checkpoints.root)))
        generators.append(torch.get_rng_state())
    assert {key.split(".")[0] for key in states[0]} == {"network", "ema", "optimizer"}
    assert differing_tensors(*states) == []
    assert torch.equal(*generators)


def test_why_a_number_is_refused_stands_in_the_log_and_on_the_run_once(
    worker: Make, tracking: Tracking
) -> None:
    settings = ("evaluation.samples=70", "evaluation.features=digits-classifier")
    trained = worker("broken", *settings)
    with torch.no_grad():
        next(iter(trained.train_step.ema.average().values())).fill_(float("nan"))
    trained.run()
    assert [step["step"] for step in trained.evaluations] == [2, 4, 6]
    assert all(math.isnan(step["eval/fd_nfe1"]) for step in trained.evaluations)
    lines = [
        line for line in (trained.setup.job.folder / LOG).read_text().splitlines() if "not finite" in line
    ]
    assert [(line.split("  ")[1], line[-7:]) for line in lines] == [
        ("step 2", "(nfe 1)"),
        ("step 2", "(nfe 2)"),
    ]
    flags = tracking.client.get_run(trained.setup.job.run).data.tags["eval.flags"]
    assert [flags.count(f"(nfe {nfe})") for nfe in (1, 2)] == [1, 1]
    again = MetricLogger(tracking.store, trained.setup.job.run, print)
    again.add_flag(lines[0].split("  ", 2)[2])
    again.flush()
    assert tracking.client.get_run(trained.setup.job.run).data.tags["eval.flags"] == flags


@pytest.mark.parametrize(
    ("features", "metrics"),
    [
        ("inception", ["eval/fid_nfe1", "eval/fid_nfe2"]),
        ("dinov2", ["eval/fd_dinov2_nfe1", "eval/fd_dinov2_nfe2"]),
        ("clip", ["eval/fd_clip_nfe1", "eval/fd_clip_nfe2"]),
        ("file:net.pt2", ["eval/fd_nfe1", "eval/fd_nfe2"]),
        (
            "digits-classifier",
            ["eval/fd_nfe1", "eval/fd_nfe2", "eval/label_agreement_nfe1", "eval/label_agreement_nfe2"],
        ),
    ],
)
def test_the_distance_on_inception_alone_is_called_fid(features: str, metrics: list[str]) -> None:
    assert list(EvaluationConfig(every=1, features=features).reported(conditional=True)) == metrics


def test_a_network_of_ones_own_is_found_from_any_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert EvaluationConfig(every=1, features="file:net.pt2").features == "file:/net.pt2"


def test_weights_that_cannot_be_had_are_named_before_training_starts(
    worker: Make, storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFLOW_INCEPTION_WEIGHTS", "/nowhere/inception.pth")
    with pytest.raises(InputError, match=r"/nowhere/inception\.pth") as caught:
        worker("blind", "evaluation.features=inception", "search.metric=eval/fid_nfe1")
    assert "\n" not in str(caught.value)
    assert not storage.sweeps.exists()


def test_fewer_samples_than_features_are_flagged_in_the_tags(
    worker: Make, thumbnail: str, tmp_path: Path
) -> None:
    few = worker("few", f"evaluation.features={exported(tmp_path / 'net', 1, 8, side=6)}").setup.evaluator
    assert few.features.dim == 36
    assert few.tags()["eval.flags"].startswith("32 samples in 36 features")
    enough = worker("enough", f"evaluation.features={thumbnail}").setup.evaluator
    assert "eval.flags" not in enough.tags()


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, items: list[Any]) -> None:
        self.rank, self.world = rank, barrier.parties
        self._barrier, self._items = barrier, items

    def gather(self, items: list[Any]) -> list[Any]:
        self._barrier.wait()
        self._items[self.rank] = items
        self._barrier.wait()
        return [item for part in self._items for item in part]

    def should_stop(self) -> bool:
        return False


def together(evaluator: Evaluator, networks: list[DiT], objective: Objective) -> list[Evaluation]:
    """What each of several ranks returns; rank i samples from networks[i]."""
    barrier, items = threading.Barrier(len(networks), timeout=60), [None] * len(networks)

    def evaluate(rank: int) -> Evaluation:
        ranks = Threads(rank, barrier, items)
        return evaluator.evaluate(networks[rank], objective, torch.device("cpu"), ranks)

    with ThreadPoolExecutor(len(networks)) as pool:
        return list(pool.map(evaluate, range(len(networks))))


def test_ranks_together_score_what_one_scores_alone(worker: Make) -> None:
    trained = worker("alone", "evaluation={every: 6, samples: 600, features: digits-classifier, grid: 2}")
    network, objective = DiT(trained.setup.config).eval(), trained.experiment.objective
    alone = trained.setup.evaluator.evaluate(network, objective, torch.device("cpu"))
    first, second = together(trained.setup.evaluator, [network, network], objective)
    assert first.metrics == second.metrics == pytest.approx(alone.metrics, rel=1e-9)
    assert list(first.grids) == ["samples/nfe1", "samples/nfe2"]
    assert second.grids == {}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_sample_that_is_not_finite_refuses_the_number_on_every_rank(worker: Make, broken: int) -> None:
    trained = worker("broken", "evaluation={every: 6, samples: 600, features: digits-classifier, grid: 2}")
    networks = [DiT(trained.setup.config).eval(), DiT(trained.setup.config).eval()]
    with torch.no_grad():
        next(networks[broken].parameters()).fill_(float("nan"))
    for result in together(trained.setup.evaluator, networks, trained.experiment.objective):
        assert all(math.isnan(value) for value in result.metrics.values())
        assert result.flags[0].startswith(f"sample {256 * broken} has values that are not finite")
        assert result.flags[0].endswith("(nfe 1)")


def test_an_evaluation_that_is_asked_to_stop_makes_no_further_batch(worker: Make) -> None:
    class StopsAtThird(SingleProcess):
        asked = 0

        def should_stop(self) -> bool:
            self.asked += 1
            return self.asked == 3

    trained = worker("stopped", "evaluation={every: 6, samples: 64, batch: 16, grid: 2}")
    ranks = StopsAtThird()
    with pytest.raises(Interrupted):
        trained.setup.evaluator.evaluate(
            DiT(trained.setup.config).eval(), trained.experiment.objective, torch.device("cpu"), ranks
        )
    assert ranks.asked == 3


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small autoencoder in diffusers' format, and a shard set of latents made with it."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(root / "autoencoder")
    pixels = np.random.default_rng(0)
    for number in range(40):
        path = root / "images" / f"class{number % 4}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    autoencoder = load_autoencoder(str(root / "autoencoder"))
    plan = ShardPlan(open_source(str(root / "images")), PrepareSettings(resolution=16), autoencoder.facts)
    prepare_locally(plan, open_storage(root / "set"), autoencoder)
    return root / "autoencoder", root / "set"


def test_latents_are_decoded_before_features_of_images(
    latents: tuple[Path, Path], tmp_path: Path, storage: ProjectFolder
) -> None:
    autoencoder, data = latents
    info = read_info(data)
    features = exported(tmp_path / "net", 3, 16)
    config = EvaluationConfig(
        every=1, samples=32, nfe=(1,), features=features, autoencoder=str(autoencoder), grid=2
    )
    evaluator = Evaluator.open(config, info, str(data), True, storage)
    assert evaluator.reference.resolution == (16, 16)
    assert evaluator.tags()["eval.autoencoder"].startswith("autoencoder (")
    assert DECODED_LATENTS in evaluator.tags()["eval.flags"]
    channels, height, width = info.shape
    assert (channels, height, width) == (4, 8, 8)
    network = DiT(DiTConfig(channels, height, width, 2, 16, 1, 2, classes=info.classes, null_label=True))
    result = evaluator.evaluate(network, SoFlow(), torch.device("cpu"))
    # The program refuses images of another size than 16 x 16.
    assert math.isfinite(result.metrics["eval/fd_nfe1"])
    assert result.grids["samples/nfe1"].shape[0] > 2 * 16


def test_pooled_features_are_scored_beside_others_on_the_same_samples(
    latents: tuple[Path, Path], tmp_path: Path, storage: ProjectFolder
) -> None:
    autoencoder, data = latents
    features = exported(tmp_path / "net", 3, 16)
    config = EvaluationConfig(
        every=1, samples=32, nfe=(1, 2), features=features, autoencoder=str(autoencoder), grid=2
    )
    images, (pooled, alone, network) = (
        Evaluator.open(config, read_info(data), str(data), True, storage),
        latent_evaluator(data, str(autoencoder), storage),
    )
    both = replace(images, pooled=Comparison(pooled.features, pooled.reference, {"pooled": "fd"}))
    result = both.evaluate(network, SoFlow(), torch.device("cpu"))
    assert result.metrics.pop("eval/pooled_nfe1") == alone.metrics["eval/fd_nfe1"]
    assert result.metrics.pop("eval/pooled_nfe2") > 0
    assert result.metrics == images.evaluate(network, SoFlow(), torch.device("cpu")).metrics
    first, second = together(both, [network, network], SoFlow())
    assert first.metrics == second.metrics
    assert first.metrics["eval/pooled_nfe1"] == pytest.approx(alone.metrics["eval/fd_nfe1"], rel=1e-9)


def test_pooled_has_its_metric_beside_fid_and_not_beside_another_fd() -> None:
    beside = EvaluationConfig(every=1, features="inception", pooled=True)
    assert list(beside.reported(True)) == [
        f"eval/{name}_nfe{nfe}" for name in ("fid", "fd") for nfe in (1, 2)
    ]
    with pytest.raises(ValueError, match="have a metric of the same name"):
        EvaluationConfig(every=1, features="file:net.pt2", pooled=True)
    assert not EvaluationConfig(every=1, features="pooled", pooled=True).also_pooled


def test_a_reference_of_its_own_is_of_images_that_no_autoencoder_has_touched(
    latents: tuple[Path, Path], tmp_path: Path, storage: ProjectFolder
) -> None:
    autoencoder, data = latents
    config = EvaluationConfig(
        every=1,
        samples=32,
        features=exported(tmp_path / "net", 3, 16),
        autoencoder=str(autoencoder),
        reference=str(data.parent / "images"),
    )
    evaluator = Evaluator.open(config, read_info(data), str(data), True, storage)
    assert evaluator.reference.count == 40
    assert evaluator.tags()["eval.reference"] == f"{data.parent / 'images'} (40 samples)"
    assert DECODED_LATENTS not in evaluator.tags().get("eval.flags", "")
    decoded = Evaluator.open(
        config.model_copy(update={"reference": None}), read_info(data), str(data), True, storage
    )
    means = [
        each.reference.moments.mean for each in (decoded, evaluator) if each.reference.moments is not None
    ]
    assert len(means) == 2
    assert not np.array_equal(*means)


def latent_evaluator(
    data: Path, autoencoder: str | None, storage: ProjectFolder
) -> tuple[Evaluator, Evaluation, DiT]:
    """An evaluator whose features need no decoder, the result of a network with it, and that network."""
    info = read_info(data)
    config = EvaluationConfig(every=1, samples=32, nfe=(1,), autoencoder=autoencoder, grid=2)
    evaluator = Evaluator.open(config, info, str(data), True, storage)
    assert evaluator.decoder is None
    network = DiT(DiTConfig(*info.shape, 2, 16, 1, 2, classes=info.classes, null_label=True))
    return evaluator, evaluator.evaluate(network, SoFlow(), torch.device("cpu")), network


def test_sample_grids_of_latents_are_decoded_whatever_the_features_see(
    latents: tuple[Path, Path], storage: ProjectFolder
) -> None:
    autoencoder, data = latents
    evaluator, result, network = latent_evaluator(data, str(autoencoder), storage)
    samples = generate(
        network, SoFlow(), 0, torch.arange(4) + (1 << 40), torch.tensor([0, 0, 2, 2]), 1, torch.device("cpu")
    )
    images = to_uint8(decode_samples(samples, load_autoencoder(str(autoencoder))))
    assert np.array_equal(result.grids["samples/nfe1"], grid_image(images, columns=2))
    assert not any("no sample grids" in text for text in (*result.flags, *evaluator.tags().values()))


@pytest.mark.parametrize("named", ["nothing", "another"])
def test_latents_that_cannot_be_decoded_have_no_grids_and_a_reason(
    latents: tuple[Path, Path], storage: ProjectFolder, tmp_path: Path, named: str
) -> None:
    """Neither in the first grids of a training nor in an evaluation; the tag has the reason before anything is trained."""
    reason = "no sample grids: the autoencoder autoencoder (weights"
    other = None
    if named == "another":
        reason, other = "no sample grids: the latents are of autoencoder", str(changed(latents[0], tmp_path))
    evaluator, result, network = latent_evaluator(latents[1], other, storage)
    assert result.grids == evaluator.grids(network, SoFlow(), torch.device("cpu")) == {}
    assert [flag for flag in result.flags if reason in flag]
    assert reason in evaluator.tags()["eval.flags"]
    assert math.isfinite(result.metrics["eval/fd_nfe1"])


def changed(autoencoder: Path, folder: Path) -> Path:
    """The same autoencoder with other weights."""
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(folder / "other")
    return folder / "other"


def test_the_autoencoder_must_be_the_one_that_made_the_latents(
    latents: tuple[Path, Path], tmp_path: Path, storage: ProjectFolder
) -> None:
    autoencoder, data = latents
    other = changed(autoencoder, tmp_path)
    features = exported(tmp_path / "net", 3, 16)
    for named, message in (
        (str(other), "the latents are of autoencoder"),
        (None, "Name its folder"),
    ):
        config = EvaluationConfig(every=1, samples=32, features=features, autoencoder=named)
        with pytest.raises(InputError, match=message):
            Evaluator.open(config, read_info(data), str(data), True, storage)
