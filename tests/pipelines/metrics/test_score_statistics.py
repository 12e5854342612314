"""Statistics for scores: parts merge to the whole, and scores that would mislead are refused or flagged."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_pipelines.features import DigitsClassifier, FeatureNetwork, Features
from soflow_pipelines.features.pooled import PooledFeatures
from soflow_pipelines.images.convert import to_uint8, to_unit_range
from soflow_pipelines.metrics import EVALUATOR, METRICS, Reference, ScoreError, ScoreStatistics, scores
from soflow_pipelines.references.reference_statistics import reference_from_images
from soflow_pipelines.sources.digits import load_digits

DIGITS_METRICS = ("fd", "is", "kid", "precision", "recall", "label_agreement")
COUNT = 200
KEPT = Path(__file__).parent / "version_0_1_0"


class Colours:
    """Features one can count by hand: the first pixel of each channel; the second row is `spatial`."""

    id = "colours-1"
    dim = 3
    metrics = frozenset(METRICS)
    warnings: tuple[str, ...] = ()
    space: Literal["images", "training"] = "images"

    def __call__(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8
        features = images[:, :, 0, 0].float()
        return Features(features, features, images[:, :, 1].flatten(1).float())


def colours(count: int, seed: int = 0, side: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)


def gathered(
    images: Tensor, metrics: Sequence[str] = ("fd",), samples: int | None = None, reservoir: int = 1000
) -> ScoreStatistics:
    statistics = ScoreStatistics(Colours(), metrics, samples, reservoir)
    statistics.update(torch.arange(len(images)), images, torch.zeros(len(images), dtype=torch.int64))
    return statistics


def reference(images: Tensor, metrics: Sequence[str] = ("fd",), reservoir: int = 1000) -> Reference:
    return reference_from_images([images], Colours(), metrics, "paint", reservoir)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images), torch.from_numpy(data.labels)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    """Untrained: what is tested is what becomes of its features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitsClassifier().eval()


@pytest.mark.parametrize("seed", range(4))
def test_statistics_of_parts_merge_to_those_of_the_whole(
    network: FeatureNetwork, digits: tuple[Tensor, Tensor], tmp_path: Path, seed: int
) -> None:
    """Workers may see any parts in any order."""
    images, labels = digits
    real = reference_from_images(images[500:].split(100), network, DIGITS_METRICS, "digits", 150)
    rng = np.random.default_rng(seed)

    def gather(indices: Tensor, size: int) -> ScoreStatistics:
        statistics = ScoreStatistics(network, DIGITS_METRICS, samples=COUNT, reservoir=120)
        for rows in indices.split(size):
            statistics.update(rows, images[rows], labels[rows])
        return statistics

    whole = scores(gather(torch.arange(COUNT), COUNT), real)
    cuts = sorted(rng.integers(0, COUNT, 4).tolist())
    parts = []
    for number, indices in enumerate(torch.from_numpy(rng.permutation(COUNT)).tensor_split(cuts)):
        np.savez(tmp_path / f"{number}.npz", **gather(indices, int(rng.integers(1, 60))).state())
        with np.load(tmp_path / f"{number}.npz", allow_pickle=False) as state:
            parts.append(ScoreStatistics.from_state(state))
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    result = scores(merged, real)
    assert set(result.values) == set(DIGITS_METRICS)
    for name in DIGITS_METRICS:
        # The features themselves are float32, and a convolution rounds with the size of its batch.
        assert result.values[name] == pytest.approx(whole.values[name], rel=1e-5), name
    assert result.flags == whole.flags
    assert result.tags == whole.tags


def test_parts_merge_to_the_whole_to_ten_digits_where_features_are_exact() -> None:
    metrics = ("fd", "sfid", "is", "kid", "precision", "recall", "label_agreement")
    images, real = colours(300), reference(colours(250, seed=1), metrics, 80)
    whole = gathered(images, metrics, 300, 90)
    merged = ScoreStatistics(Colours(), metrics, 300, 90)
    for rows in torch.randperm(300, generator=torch.Generator().manual_seed(2)).split([7, 150, 1, 142]):
        part = ScoreStatistics(Colours(), metrics, 300, 90)
        part.update(rows, images[rows], torch.zeros(len(rows), dtype=torch.int64))
        merged.merge(part)
    one, many = scores(whole, real), scores(merged, real)
    assert many.values == pytest.approx(one.values, rel=1e-10)
    assert many.spread == pytest.approx(one.spread, rel=1e-10)


def test_what_is_kept_for_fid_does_not_grow_with_the_number_of_images() -> None:
    def size(count: int) -> int:
        return sum(array.nbytes for array in gathered(colours(count), ("fid", "sfid")).state().values())

    assert size(10) == size(1000)


def test_a_state_takes_more_images_with_its_network_only() -> None:
    images = colours(20)
    half = ScoreStatistics.from_state(gathered(images[:10]).state(), Colours())
    half.update(torch.arange(10, 20), images[10:])
    real = reference(colours(50, seed=1))
    assert scores(half, real).values == pytest.approx(scores(gathered(images), real).values, rel=1e-12)
    with pytest.raises(ValueError, match="given their network"):
        ScoreStatistics.from_state(half.state()).update(torch.arange(1), images[:1])
    with pytest.raises(ScoreError, match="are of colours-1, the network is pooled"):
        ScoreStatistics.from_state(half.state(), PooledFeatures((3, 4, 4)))


def test_the_official_rule_cuts_the_fraction_off() -> None:
    """uint8(clamp(127.5 x + 128, 0, 255)): every pixel value comes back, halves go up, and what is beyond is white or black."""
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(every)), every)
    values = torch.tensor([-9, -1, -0.5, 0.0, 0.5, 1, 9, 126.5 / 127.5, 127.25 / 127.5])
    expected = [0, 0, 64, 128, 191, 255, 255, 254, 255]
    assert to_uint8(values[None]).tolist() == [expected]
    just_below = torch.tensor([[(k - 128 - 1e-3) / 127.5 for k in range(1, 256)]])
    assert to_uint8(just_below).tolist() == [list(range(255))]


def test_float_samples_are_scored_as_the_uint8_images_they_become() -> None:
    images, real = colours(50), reference(colours(60, seed=1))
    statistics = ScoreStatistics(Colours(), ["fd"])
    statistics.update(torch.arange(50), to_unit_range(images))
    assert scores(statistics, real).values == scores(gathered(images), real).values


def test_pooled_features_see_the_training_space_itself() -> None:
    latents = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * 5
    network = PooledFeatures((4, 4, 4))
    real = reference_from_images([latents], network, ["fd"], "latents")
    statistics = ScoreStatistics(network, ["fd"])
    statistics.update(torch.arange(40), latents)
    assert real.moments is not None
    np.testing.assert_allclose(real.moments.mean, latents.flatten(1).double().mean(0), rtol=1e-12)
    assert scores(statistics, real).values["fd"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"samples in the training space, not of torch\.uint8 images"):
        statistics.update(torch.arange(40, 44), torch.zeros(4, 4, 4, 4, dtype=torch.uint8))


def test_a_reference_comes_back_from_its_file(tmp_path: Path) -> None:
    metrics = ("fd", "sfid", "kid", "precision")
    real = reference(colours(60, seed=1), metrics)
    real.save(tmp_path / "reference.npz")
    generated = gathered(colours(50), metrics)
    assert scores(generated, Reference.load(tmp_path / "reference.npz")) == scores(generated, real)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


def test_files_of_version_0_1_0_give_the_same_states_and_scores() -> None:
    """Written by version 0.1.0: 30 samples in two parts and merged, and a reference of 25 images."""
    first, second, merged = (
        dict(np.load(KEPT / f"statistics-{name}.npz")) for name in ("first", "second", "merged")
    )
    assert equal(ScoreStatistics.from_state(first).state(), first)
    statistics = ScoreStatistics.from_state(first)
    statistics.merge(ScoreStatistics.from_state(second))
    assert equal(statistics.state(), merged)
    result = scores(statistics, Reference.load(KEPT / "reference.npz"))
    assert result.values == pytest.approx(
        {
            "fid": 149.08387000276707,
            "fd": 149.08387000276707,
            "sfid": 1853.2267138825846,
            "kid": -570681039928.9786,
            "precision": 1.0,
            "recall": 0.9333333333333333,
            "is": 2.5555318440249373,
            "label_agreement": 0.5333333333333333,
        },
        rel=1e-12,
    )


def equal(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two states have the same arrays, bit for bit, in the same order."""
    return list(state) == list(other) and all(
        state[key].dtype == other[key].dtype and np.array_equal(state[key], other[key]) for key in state
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("network", [Colours(), PooledFeatures((3, 4, 4))])
def test_a_sample_that_is_not_finite_is_refused_by_its_number(value: float, network: FeatureNetwork) -> None:
    samples = torch.zeros(4, 3, 4, 4)
    samples[2, 1, 3, 0] = value
    statistics = ScoreStatistics(network, ["fd"])
    with pytest.raises(ScoreError, match="sample 12 has values that are not finite, as 1 of 4"):
        statistics.update(torch.arange(10, 14), samples)
    assert statistics.count == 0


def test_a_missing_sample_is_refused() -> None:
    with pytest.raises(ScoreError, match="19 of 20 samples were counted"):
        scores(gathered(colours(19), samples=20), reference(colours(50)))


def test_a_sample_counted_twice_in_place_of_another_is_refused() -> None:
    statistics = ScoreStatistics(Colours(), ["fd"], samples=20)
    statistics.update(torch.tensor([*range(19), 3]), colours(20))
    with pytest.raises(ScoreError, match="one was counted twice"):
        scores(statistics, reference(colours(50)))


def test_a_reference_of_other_features_is_refused() -> None:
    other = dataclasses.replace(reference(colours(50)), features="colours-2")
    with pytest.raises(ScoreError, match="has the features colours-2, the samples colours-1"):
        scores(gathered(colours(50)), other)


def test_a_reference_of_another_resolution_is_refused() -> None:
    """One of unknown resolution is flagged."""
    real = reference(colours(50, side=8))
    with pytest.raises(ScoreError, match="paint are 8 x 8, the samples 4 x 4"):
        scores(gathered(colours(50)), real)
    (flag,) = scores(gathered(colours(50)), dataclasses.replace(real, resolution=None)).flags
    assert "does not say the size of its images; the samples are 4 x 4" in flag


def test_a_reference_without_what_a_metric_compares_is_refused() -> None:
    generated = gathered(colours(50), ("fd", "sfid", "kid"))
    with pytest.raises(ScoreError, match="lacks the statistics that fd needs"):
        scores(generated, reference(colours(50), ["kid"]), ["fd"])
    with pytest.raises(ScoreError, match="lacks the statistics that sfid needs"):
        scores(generated, reference(colours(50), ["fd"]), ["sfid"])
    with pytest.raises(ScoreError, match="only their statistics: kid needs them"):
        scores(generated, reference(colours(50), ["fd"]), ["kid"])
    with pytest.raises(ScoreError, match="needs a reference"):
        scores(generated, None, ["fd"])


def test_images_of_two_sizes_are_refused() -> None:
    statistics = gathered(colours(5))
    with pytest.raises(ScoreError, match="sample 5 is 8 x 8, those before it are 4 x 4"):
        statistics.update(torch.arange(5, 6), colours(1, side=8))
    with pytest.raises(ScoreError, match="8 x 8 cannot join those of images 4 x 4"):
        statistics.merge(gathered(colours(5, side=8)))


def test_statistics_of_something_else_cannot_join() -> None:
    with pytest.raises(ScoreError, match="metrics"):
        gathered(colours(5)).merge(gathered(colours(5), ["kid"]))
    with pytest.raises(ScoreError, match="samples"):
        gathered(colours(5)).merge(gathered(colours(5), samples=5))


def test_metrics_that_a_network_cannot_give_are_refused(network: FeatureNetwork) -> None:
    with pytest.raises(
        ScoreError, match=r"fid cannot be measured on the features digits-cnn-1; on them there are fd, is"
    ):
        ScoreStatistics(network, ["fid"])
    with pytest.raises(ScoreError, match="no metric 'lpips'; there are fid, fd"):
        ScoreStatistics(network, ["lpips"])
    with pytest.raises(ScoreError, match="no metric to measure"):
        ScoreStatistics(network, [])
    with pytest.raises(ScoreError, match="kid was not gathered"):
        scores(gathered(colours(5)), reference(colours(5)), ["kid"])


def test_label_agreement_of_samples_without_labels_is_refused() -> None:
    statistics = ScoreStatistics(Colours(), ["label_agreement"])
    with pytest.raises(ScoreError, match="these have none"):
        statistics.update(torch.arange(2), colours(2))


def test_one_sample_has_no_score() -> None:
    with pytest.raises(ScoreError, match="at least 2 samples, there are 1"):
        scores(gathered(colours(1)), reference(colours(5)))
    with pytest.raises(ScoreError, match="holds no images"):
        reference_from_images([], Colours(), ["fd"], "nothing")


def test_fewer_samples_than_features_are_flagged_on_each_side() -> None:
    few, enough = colours(11), colours(13)
    for generated, real, flagged in ((few, enough, "the samples"), (enough, few, "the reference paint")):
        (flag,) = scores(gathered(generated, ["sfid"]), reference(real, ["sfid"])).flags
        assert flag.startswith("sfid of 11 images in 12 features")
        assert flagged in flag
    assert scores(gathered(enough, ["sfid"]), reference(colours(12), ["sfid"])).flags == []


def test_small_sets_are_flagged_by_each_metric() -> None:
    result = scores(gathered(colours(20), ["is"], samples=20))
    assert "splits of 2 images for 3 classes" in result.flags[0]
    result = scores(gathered(colours(20), ["kid"]), reference(colours(30, seed=1), ["kid"]))
    assert result.flags == ["kid is over subsets of 20 images, for there are no 1000."]
    result = scores(
        gathered(colours(20), ["recall"], reservoir=10), reference(colours(30, seed=1), ["recall"], 20)
    )
    assert result.flags == [
        "precision and recall are of 10 of the 20 samples.",
        "precision and recall are of 20 of the 30 real images.",
    ]
    with pytest.raises(ScoreError, match="at least 4 images on each side, there are 20 and 3"):
        scores(gathered(colours(20), ["recall"]), reference(colours(3), ["recall"]))
    with pytest.raises(ScoreError, match="each of its 10 splits, there are 9 samples"):
        scores(gathered(colours(9), ["is"], samples=9))


def test_the_warnings_of_a_network_go_with_every_number() -> None:
    class Repainted(Colours):
        warnings = ("The paint is not the published one.",)

    statistics = ScoreStatistics(Repainted(), ["fd"])
    statistics.update(torch.arange(50), colours(50))
    real = reference_from_images([colours(50)], Repainted(), ["fd"], "paint")
    assert scores(ScoreStatistics.from_state(statistics.state()), real).flags == list(Repainted.warnings)


def test_the_tags_say_what_the_numbers_are_of() -> None:
    result = scores(gathered(colours(20)), reference(colours(30)))
    assert result.tags == {
        "evaluator": EVALUATOR,
        "features": "colours-1",
        "samples": "20",
        "reference": "paint",
        "reference_samples": "30",
    }
