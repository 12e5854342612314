"""Reference statistics of real images on one feature network: computed where they are missing, and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.reference import Reference
from soflow_pipelines.metrics.score_statistics import ScoreStatistics
from soflow_pipelines.metrics.scores import check_size
from soflow_pipelines.references.image_sets import NpzImages, is_shard_set, npz_path
from soflow_pipelines.references.latent_decoder import open_decoder
from soflow_pipelines.references.reference_statistics import (
    cached_reference,
    compared_metrics,
    reference_from_adm,
)
from soflow_pipelines.references.statistics_job import ComputeStatistics, LocalStatistics, StatisticsJob
from soflow_pipelines.references.stored_images import StoredImages, stored_images, stored_shard_set
from soflow_pipelines.shards.info import DataMismatch, DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.source import SourceError
from soflow_pipelines.storage.files import sha256

DECODED_LATENTS = (
    "The reference is of images decoded from the training latents, not of the images themselves: the distance leaves out what the "
    "autoencoder loses."
)


@dataclass(frozen=True)
class ReferenceLocation:
    """Location of the images of a reference."""

    place: str
    autoencoder: str | None = None
    """Folder or id of the autoencoder for a shard set of latents; None: the one its description names."""
    expected: str | None = None
    """Digest that a shard set must have, because a network was trained on it."""


@dataclass(frozen=True)
class ResolvedReference:
    """A reference with its digest and its flags."""

    reference: Reference
    digest: str
    """Digest of the images and of their preprocessing."""
    flags: tuple[str, ...] = ()
    """Sentences: why numbers taken against it are not comparable with others of their name."""
    crop: int | None = None
    """Side of the ADM crop that was made."""

    def tags(self, place: str) -> dict[str, str]:
        """Every property of the reference that a score depends on, as tags."""
        count = self.reference.count
        tags = {
            "reference": place,
            "reference_digest": self.digest.rsplit(":", 1)[-1][:16],
            "reference_samples": "unknown" if count is None else str(count),
        }
        return tags if self.crop is None else {**tags, "reference_crop": f"adm{self.crop}"}


@dataclass(frozen=True)
class ReferenceStore:
    """Reference statistics for some metrics on one feature network."""

    features: FeatureNetwork
    features_name: str
    metrics: tuple[str, ...]
    folder: Path
    """Folder of reference files, named by the digest of images, features and metrics."""
    compute: ComputeStatistics | None = None
    """Computes the statistics that are missing; None: this process, on `features`."""

    def resolve(self, location: ReferenceLocation, size: tuple[int, int] | None = None) -> ResolvedReference:
        """The reference at a location, whatever kind of images it holds; `size` (H, W) is that of the samples.

        Raises InputError where the location holds no reference, or one of another size or other data.
        """
        info = _shard_set(location)
        if info is None and self.features.space == "training":
            raise SourceError(
                f"{self.features_name} looks at the training space: its reference is a shard set, not {location.place}."
            )
        if location.place.endswith(".npz"):
            return self.of_adm_npz(location.place, size)
        if info is None:
            return self.of_images(location.place, size)
        if size is not None and (info.kind == "pixels" or self.features.space == "training"):
            check_size(location.place, (info.shape[1], info.shape[2]), size)
        if self.features.space == "images":
            open_decoder(info, location.autoencoder, "cpu")
        return self.of_training_data(info, location.place, location.autoencoder)

    def of_training_data(
        self, info: DatasetInfo, place: str, autoencoder: str | None = None
    ) -> ResolvedReference:
        """The reference of a shard set: of its images, latents decoded, or of its samples for features of the training space."""
        images = stored_shard_set(place, info, autoencoder, self.features.space == "images")
        return ResolvedReference(
            self._of_stored(images), info.digest, tuple(reference_flags(info, self.features))
        )

    def of_images(self, place: str, size: tuple[int, int] | None = None) -> ResolvedReference:
        """The reference of a folder or an archive of images, those that are larger than `size` (H, W) cropped to it."""
        images = stored_images(place, size=size)
        flags: tuple[str, ...] = ()
        if images.resolution is not None:
            side = f"{images.resolution} x {images.resolution}"
            flags = (f"The images of the reference {place} were scaled and cropped to {side} as ADM does.",)
        return ResolvedReference(self._of_stored(images), images.digest, flags, images.resolution)

    def of_adm_npz(self, place: str, size: tuple[int, int] | None = None) -> ResolvedReference:
        """The reference of an ADM batch: the statistics in the file, and those that are missing from the images in it."""
        path = npz_path(place)
        digest = sha256(path)

        def describe(npz: NpzImages, metrics: list[str]) -> Reference:
            if size is not None:
                check_size(place, npz.resolution, size)
            images = StoredImages(str(path.absolute()), digest, len(npz))
            return Reference.of(self._statistics(images, tuple(metrics)), place)

        reference = cached_reference(
            self.folder,
            digest,
            self.features.id,
            self.metrics,
            lambda: reference_from_adm(path, self.features, self.metrics, describe),
        )
        return ResolvedReference(reference, digest)

    def _of_stored(self, images: StoredImages) -> Reference:
        return cached_reference(
            self.folder,
            images.digest,
            self.features.id,
            self.metrics,
            lambda: Reference.of(self._statistics(images, self.metrics), images.place),
        )

    def _statistics(self, images: StoredImages, metrics: tuple[str, ...]) -> ScoreStatistics:
        shape = (0, 0, 0) if images.info is None else images.info.shape
        job = StatisticsJob(images, self.features_name, self.features.id, metrics, shape)
        compute = self.compute or LocalStatistics(self.features)
        return compute(job)


def open_reference(
    place: str | Path,
    network: FeatureNetwork,
    metrics: Iterable[str],
    folder: Path,
    *,
    resolution: int | None = None,
    autoencoder: str | None = None,
) -> Reference:
    """The reference at a place: an ADM batch (.npz), a folder or archive of images, a shard set; kept in `folder`.

    `resolution` crops the images of a folder or archive, `autoencoder` is a folder or id that decodes latents. Raises InputError.
    """
    store = ReferenceStore(network, network.id, tuple(sorted(set(compared_metrics(metrics)))), folder)
    size = None if resolution is None else (resolution, resolution)
    return store.resolve(ReferenceLocation(str(place), autoencoder), size).reference


def reference_flags(info: DatasetInfo, features: FeatureNetwork) -> list[str]:
    """Flags of training data as a reference on these features."""
    return [DECODED_LATENTS] if info.kind == "latents" and features.space == "images" else []


def _shard_set(location: ReferenceLocation) -> DatasetInfo | None:
    """The description of a shard set; None for another place. Raises DataMismatch where it is not the one expected."""
    if not is_shard_set(location.place):
        if location.expected is not None:
            raise DataMismatch(
                f"the data {location.place} that the network was trained on are gone: name others with --reference."
            )
        return None
    info = read_info(location.place)
    if location.expected is not None and info.digest != location.expected:
        raise DataMismatch(
            f"{location.place} holds other data ({info.digest}) than the network was trained on ({location.expected}): name the "
            "reference with --reference."
        )
    return info
