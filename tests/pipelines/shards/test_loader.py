"""The loader: one order for every world size and thread count, continued exactly."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.loader import LoadedBatch, ShardLoader
from soflow_pipelines.shards.order import SampleOrder
from soflow_pipelines.shards.tables import read_index
from soflow_pipelines.shards.writer import Sample, write_shards

SAMPLES = 53
NUMBERED = DatasetInfo(kind="pixels", shape=(1, 1, 2), dtype="uint8", classes=SAMPLES)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 samples in 8 shards of 7, the last of 4; sample i has label i."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    samples = [Sample(f"{i:03d}", np.array([[[i, 255 - i]]], np.uint8), i) for i in range(SAMPLES)]
    write_shards(samples, folder, NUMBERED, per_shard=7)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "set"
    info = DatasetInfo(kind="latents", shape=(4, 4, 4), dtype="float16", classes=5, scaling=0.5, shift=1.0)
    rng = np.random.default_rng(0)
    moments = rng.random((40, 8, 4, 4)).astype(np.float16)
    write_shards([Sample(f"{i:03d}", m, i % 5) for i, m in enumerate(moments)], folder, info, per_shard=9)
    return folder


def take(
    uri: Path, steps: int, batch: int, world: int = 1, consumed: int = 0, seed: int = 3, threads: int = 1
) -> list[int]:
    """Labels in the global order, put together from all ranks."""
    loaders = [
        ShardLoader(uri, batch, rank, world, seed=seed, consumed=consumed, threads=threads)
        for rank in range(world)
    ]
    order: list[int] = []
    for _ in range(steps):
        batches = [next(loader) for loader in loaders]
        order += merge(batches)
    for loader in loaders:
        assert loader.consumed == consumed + steps * batch
        loader.close()
    return order


def merge(batches: Sequence[LoadedBatch]) -> list[int]:
    positions = torch.cat([batch.positions for batch in batches])
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    assert len(positions.unique()) == len(positions) == len(labels)
    assert positions.max() - positions.min() == len(positions) - 1
    return labels[positions.argsort()].tolist()


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_every_world_size_reads_the_same_global_order(numbered: Path, world: int) -> None:
    assert take(numbered, 6, 24, world) == take(numbered, 6, 24, 1)


def test_more_ranks_than_shards_still_make_equal_steps(tmp_path: Path) -> None:
    samples = [Sample(f"{i}", np.array([[[i, 0]]], np.uint8), i) for i in range(10)]
    write_shards(samples, tmp_path / "set", NUMBERED, per_shard=6)
    assert take(tmp_path / "set", 5, 8, world=8) == take(tmp_path / "set", 5, 8, world=1)


@pytest.mark.parametrize("threads", [0, 2, 5])
def test_the_order_is_the_same_for_any_number_of_threads(numbered: Path, threads: int) -> None:
    assert take(numbered, 20, 16, threads=threads) == take(numbered, 20, 16, threads=1)


def test_each_epoch_holds_every_sample_once_and_has_an_order_of_its_own(numbered: Path) -> None:
    order = take(numbered, 53, 4)
    epochs = [order[e * SAMPLES : (e + 1) * SAMPLES] for e in range(4)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(numbered, 53, 4, seed=4) != order


@pytest.mark.parametrize("worlds", [(1, 2), (2, 3), (3, 8), (8, 1)])
def test_resuming_mid_epoch_with_another_world_continues_the_global_order(
    numbered: Path, worlds: tuple[int, int]
) -> None:
    whole = take(numbered, 8, 24)
    before, after = worlds
    first = take(numbered, 3, 24, before)
    second = take(numbered, 5, 24, after, consumed=72)
    assert first + second == whole


def test_resuming_with_another_batch_size_continues_the_global_order(numbered: Path) -> None:
    assert take(numbered, 5, 6) + take(numbered, 3, 30, consumed=30) == take(numbered, 1, 120)


def test_images_come_with_their_own_label_in_the_unit_range(numbered: Path) -> None:
    with ShardLoader(numbered, 53, seed=1) as loader:
        batch = next(loader)
    assert batch.labels is not None
    assert batch.x0.shape == (53, 1, 1, 2)
    assert batch.x0.dtype == torch.float32
    torch.testing.assert_close(batch.x0[:, 0, 0, 0], batch.labels / 127.5 - 1, rtol=0, atol=1e-6)


def test_a_latent_is_drawn_from_its_posterior_by_seed_and_position_alone(latents: Path) -> None:
    whole = next(ShardLoader(latents, 24, seed=5))
    mean = next(ShardLoader(latents, 24, seed=5, posterior="mean"))
    moments = next(ShardLoader(latents, 24, seed=5, posterior="moments"))
    mu, std = moments.x0.chunk(2, dim=1)
    torch.testing.assert_close(mean.x0, (mu - 1.0) * 0.5)
    eps = ((whole.x0 / 0.5 + 1.0) - mu) / std
    assert abs(eps.mean()) < 0.1
    assert abs(eps.std() - 1) < 0.1
    for rank in range(3):
        part = next(ShardLoader(latents, 24, rank, 3, seed=5))
        assert torch.equal(part.x0, whole.x0[rank::3])


def test_a_latent_is_drawn_afresh_in_the_next_epoch(latents: Path) -> None:
    loader = ShardLoader(latents, 40, seed=5)
    first, second = next(loader), next(loader)
    moments = ShardLoader(latents, 40, seed=5, posterior="moments")
    where = [batch.x0.flatten(1) for batch in (next(moments), next(moments))]
    same = torch.cdist(*where).argmin(1)
    assert not torch.isclose(first.x0, second.x0[same]).all(dim=(1, 2, 3)).any()


def test_the_shuffle_of_a_set_of_one_window_is_uniform() -> None:
    count = 20_000
    order = SampleOrder([count // 10] * 10, [1] * 10, seed=0)
    positions = np.arange(count)
    epochs = [order.rows(positions + epoch * count) for epoch in range(5)]
    for rows in epochs:
        assert sorted(rows) == list(positions)
        # The standard deviation of Spearman's rho over uniform permutations is 1 / sqrt(n - 1) = 0.007.
        assert abs(spearmanr(positions, rows).statistic) < 0.03
        neighbours = (np.abs(np.diff(rows)) == 1).sum()
        assert neighbours < 12  # Poisson with mean 2
    assert abs(spearmanr(epochs[0], epochs[1]).statistic) < 0.03


def test_the_shuffle_over_many_windows_is_near_uniform() -> None:
    """80 shards in windows of 16, as ImageNet's latents have."""
    shards, each = 80, 250
    order = SampleOrder([each] * shards, [1] * shards, seed=0, window_bytes=16)
    positions = np.arange(shards * each)
    correlations, kept = [], []
    for epoch in range(20):
        rows = order.rows(positions + epoch * len(positions))
        assert sorted(rows) == list(positions)
        correlations.append(spearmanr(positions, rows).statistic)
        kept.append((np.abs(np.diff(rows)) == 1).mean())
    # Shards move as wholes, so rho spreads like that of 80 items: 1 / sqrt(79) = 0.11.
    assert abs(np.mean(correlations)) < 0.08
    assert np.std(correlations) < 0.2
    assert np.mean(kept) < 0.002


@pytest.mark.parametrize("window_bytes", [10**9, 16])
def test_samples_of_one_class_come_in_runs_and_each_once_an_epoch(window_bytes: int) -> None:
    """What fills no run comes at the end of its window."""
    shards, each, run = 40, 50, 8
    labels = np.random.default_rng(0).integers(7, size=shards * each)
    order = SampleOrder([each] * shards, [1] * shards, 3, window_bytes, run, labels)
    positions, ends = np.arange(shards * each), []
    for epoch in range(2):
        rows = order.rows(positions + epoch * len(positions))
        assert sorted(rows) == list(positions)
        begin = 0
        for window in order.windows(epoch):
            seen = labels[rows[begin : begin + each * len(window)]]
            filled = sum(count // run * run for count in np.bincount(seen))
            blocks = seen[:filled].reshape(-1, run)
            assert (blocks == blocks[:, :1]).all()
            # Runs of a class are not neighbours more often than by chance, of one pair in seven.
            assert (blocks[1:, 0] == blocks[:-1, 0]).mean() < 0.25
            begin += len(seen)
        ends.append(rows)
    assert not np.array_equal(ends[0], ends[1])
    samples = [SampleOrder([each] * shards, [1] * shards, 3, window_bytes).rows(positions), ends[0]]
    assert not np.array_equal(*samples)
    again = SampleOrder([each] * shards, [1] * shards, 3, window_bytes, run, labels)
    assert np.array_equal(again.rows(positions[700:900]), ends[0][700:900])


def test_batches_of_runs_are_of_few_classes_on_any_number_of_ranks(tmp_path: Path) -> None:
    folder = ensure_builtin("digits", tmp_path / "digits")
    whole = next(ShardLoader(folder, 64, seed=2, class_run=16))
    assert whole.labels is not None
    assert len(whole.labels.unique()) <= 4
    parts = [next(ShardLoader(folder, 64, rank, 2, seed=2, class_run=16)) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.x0, whole.x0[rank::2])
    assert len(next(ShardLoader(folder, 64, seed=2)).labels.unique()) == 10


def test_runs_of_a_class_need_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs of 4 samples of one class need .* labels"):
        SampleOrder([10], [1], seed=0, run=4)
    info = DatasetInfo(kind="pixels", shape=(1, 1, 2), dtype="uint8", classes=None)
    samples = [Sample(f"{i}", np.zeros((1, 1, 2), np.uint8), None) for i in range(4)]
    write_shards(samples, tmp_path / "set", info)
    with pytest.raises(ValueError, match="cannot come in runs of 2 of one class: the set has no labels"):
        ShardLoader(tmp_path / "set", 2, class_run=2)


def test_a_window_opens_a_bounded_number_of_shards() -> None:
    order = SampleOrder([5] * 40, [10] * 40, seed=2, window_bytes=60)
    assert {len(window) for window in order.windows(0)} == {6, 4}
    assert sorted(shard for window in order.windows(0) for shard in window) == list(range(40))


def test_equal_digits_come_for_equal_seeds_from_the_builtin_set(tmp_path: Path) -> None:
    folder = ensure_builtin("digits", tmp_path / "digits")
    with ShardLoader(folder, 128, seed=9) as one, ShardLoader(folder, 128, seed=9) as other:
        for _ in range(20):
            a, b = next(one), next(other)
            assert torch.equal(a.x0, b.x0)
            assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize(
    "asked", [{"batch_size": 2, "world": 3}, {"batch_size": 4, "rank": 2, "world": 2}, {"batch_size": 0}]
)
def test_ranks_that_have_no_row_of_the_batch_are_refused(numbered: Path, asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rank"):
        ShardLoader(numbered, **asked)


def test_flipped_bytes_are_named_with_shard_and_key(numbered: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(numbered, tmp_path / "set")
    row = read_index(folder).to_pylist()[30]
    shard = folder / f"shard-{row['shard']:06d}.tar"
    content = bytearray(shard.read_bytes())
    content[row["offset"] + row["bytes"] - 1] ^= 1
    shard.write_bytes(content)
    with (
        ShardLoader(folder, 53) as loader,
        pytest.raises(ShardError, match=rf"{shard.name}, sample 030.*CRC"),
    ):
        next(loader)


def test_a_shard_of_another_size_and_a_missing_one_are_named(numbered: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(numbered, tmp_path / "set")
    shard = folder / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-600])
    with pytest.raises(ShardError, match=r"shard-000002\.tar has \d+ bytes, the manifest lists \d+"):
        ShardLoader(folder, 53)
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-000002\.tar is missing"):
        ShardLoader(folder, 53)


def test_tables_that_disagree_are_refused_at_once(numbered: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(numbered, tmp_path / "set")
    text = (folder / "dataset.json").read_text().replace('"samples": 53', '"samples": 54')
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ShardError, match=r"counts 54 samples.* 53"):
        ShardLoader(folder, 4)
    (folder / "index.parquet").unlink()
    with pytest.raises(ShardError, match=r"index\.parquet"):
        ShardLoader(folder, 4)


def test_unlabelled_sets_give_no_labels(tmp_path: Path) -> None:
    info = DatasetInfo(kind="pixels", shape=(1, 1, 2), dtype="uint8")
    write_shards([Sample(f"{i}", np.zeros((1, 1, 2), np.uint8)) for i in range(5)], tmp_path / "set", info)
    with ShardLoader(tmp_path / "set", 4) as loader:
        assert next(loader).labels is None


def test_positions_count_on_over_epochs(numbered: Path) -> None:
    with ShardLoader(numbered, 50) as loader:
        positions = torch.cat([next(loader).positions for _ in range(3)])
    assert Counter(positions.tolist()) == Counter(range(150))
