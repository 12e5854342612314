"""`soflowctl generate`: images from weights, in numbered parts, by a pool of actors or in this process.

Image i is a function of (weights, seed, i, label i, sampler, steps, execution) alone, in whichever process and order it is made: a
command that was interrupted makes only the parts that are missing, and every run of it gives the same bytes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from soflow_pipelines.sources.generated import MANIFEST_NAME
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.cluster.actor_pool import ActorPool, Progress, Report, deterministic_torch, no_report
from soflow_platform.cluster.connection import connected
from soflow_platform.config.locations import absolute_autoencoder
from soflow_platform.errors import UserError
from soflow_platform.generation.chosen_labels import ChosenLabels, labels_by_rule, labels_of_table
from soflow_platform.generation.decoding import autoencoder_tag, open_sample_decoder
from soflow_platform.generation.execution import Execution
from soflow_platform.generation.finished_set import finish, remove_leftovers
from soflow_platform.generation.output_formats import FORMATS, PngFormat
from soflow_platform.generation.parts import PartMaker, naming_the_place
from soflow_platform.generation.plan import (
    GRID_NAME,
    PARTS_FOLDER,
    GenerationPlan,
    PartTask,
    claim,
    images_per_part,
)
from soflow_platform.generation.sampling import sampling_facts
from soflow_platform.jobs.model_under_test import ModelUnderTest
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.jobs.targets import TargetResolver
from soflow_platform.storage.locks import locked
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

DEFAULT_IMAGES = 100
IN_THIS_PROCESS = 256
"""Images up to which starting Ray takes longer than it saves."""
LOCK_NAME = "lock"


@dataclass(frozen=True)
class Generated:
    """Result of `generate`."""

    out: str
    made: int
    """Images made by this call."""
    kept: int
    """Images that were there before."""
    parts: int
    rejected: int
    """Rows of the table that were left out."""
    seconds: float
    """From the first part to the last one's end, with the start of the workers."""
    grid: str | None
    """Name of the grid in the set."""
    steps: int = 1
    """Sampling steps of each image."""
    sampling: dict[str, str] = field(default_factory=dict)
    """Sampler settings of the images, as tags."""

    @property
    def images_per_second(self) -> float:
        return self.made / self.seconds if self.seconds else 0.0


def generate(
    request: GenerateRequest,
    project: ProjectFolder,
    store: TrackingStore,
    report: Report = no_report,
) -> Generated:
    """Make the images of the set that are missing, and complete it.

    Raises InputError where the model cannot be found or sampled, or the place holds another set; JobError where a part fails.
    """
    out = open_storage(request.out)
    with contextlib.ExitStack() as stack:
        copies = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soflow-weights-")))
        if request.address is not None:
            # Every machine of a cluster reads the weights from the project folder.
            copies = project.root / "evaluations" / "weights"
        plan = make_plan(request, project, store, copies)
        require_devices(plan.execution, request.address)
        claim(plan, out, out.names())
        # After the claim: a folder that is refused is left as it was.
        stack.enter_context(_exclusive(out))
        names = out.names()
        claim(plan, out, names)
        remove_leftovers(out)
        tasks = plan.missing(names)
        if not tasks and MANIFEST_NAME in names:
            return _result(plan, 0, 0.0)
        # Until it is written again, the set is not finished.
        out.remove(MANIFEST_NAME)
        started = time.perf_counter()
        made = sum(_made(plan, tasks, request, report))
        seconds = time.perf_counter() - started
        with naming_the_place(out):
            finish(plan, out)
        return _result(plan, made, seconds)


def _result(plan: GenerationPlan, made: int, seconds: float) -> Generated:
    grid = GRID_NAME if isinstance(plan.format, PngFormat) else None
    rejected = len(plan.chosen.rejected)
    how = plan.settings["steps"], plan.settings["sampling"]
    return Generated(plan.out, made, plan.count - made, plan.parts, rejected, seconds, grid, *how)


def require_devices(execution: Execution, address: str | None) -> None:
    """Raises UserError where this machine, or the cluster at `address`, lacks the devices on which passes are run so."""
    if address is None:
        execution.require_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if execution.graphs:
        with connected(address) as cluster:
            if cluster.gpus < 1:
                raise UserError(
                    f"--graphs records passes of a network on a GPU, and the cluster at {address} has none: leave it out."
                )


def make_plan(
    request: GenerateRequest, project: ProjectFolder, store: TrackingStore, copies: Path
) -> GenerationPlan:
    """Finds the weights and decides on every image; nothing is written. Raises InputError."""
    target = TargetResolver(project, store, copies, accepts_images=False).find(request.model)
    assert target.weights is not None
    model = ModelUnderTest.open(target.weights, request.sampling)
    steps = request.steps or target.usual_steps or 1
    nfe = model.nfe(steps)
    chosen = _labels(request, model.config.classes)
    autoencoder = absolute_autoencoder(request.autoencoder)
    decoder = None
    shape = model.shape
    if not FORMATS[request.format].stores_latents:
        decoder = open_sample_decoder(model.config, model.data, autoencoder, "cpu")
    if decoder is not None:
        factor = decoder.facts.factor
        shape = (3, shape[1] * factor, shape[2] * factor)
    named = model.data.class_names if model.data is not None else ()
    settings = {
        "model": target.name,
        "weights": model.digest,
        "steps": steps,
        "nfe": nfe,
        "seed": request.seed,
        "sampling": sampling_facts(model.objective),
        **asdict(Execution(request.precision, request.compile, request.graphs)),
        "autoencoder": None if decoder is None else autoencoder_tag(decoder.facts),
        "labels": chosen.rule,
        "num": chosen.requested,
        "format": request.format,
        "shape": list(shape),
        "per_part": images_per_part(len(chosen.indices)),
    }
    return GenerationPlan(
        out=_absolute(request.out),
        weights=str(target.weights),
        settings=settings,
        chosen=chosen,
        class_names=named if len(named) == model.config.classes else (),
        sampling=dict(request.sampling),
        autoencoder=autoencoder,
        batch=request.batch,
    )


def _labels(request: GenerateRequest, classes: int | None) -> ChosenLabels:
    if request.table is None:
        return labels_by_rule(request.labels, request.num or DEFAULT_IMAGES, classes, request.seed)
    if request.num is not None or request.labels is not None:
        raise UserError(
            "--table says how many images there are and their labels: leave --num and labels out."
        )
    return labels_of_table(request.table, classes, request.skip_bad)


def _absolute(out: str) -> str:
    """The place of a set as processes with other working folders find it."""
    store = open_storage(out)
    return str(store.folder) if isinstance(store, LocalFolder) else out


@contextlib.contextmanager
def _exclusive(store: ObjectStore) -> Iterator[None]:
    """Keeps a folder for one command. Object storage has no locks: there, two commands write the same bytes twice."""
    if not isinstance(store, LocalFolder):
        yield
        return
    with locked(store.path(f"{PARTS_FOLDER}/{LOCK_NAME}")) as mine:
        if not mine:
            raise UserError(f"another command is making images in {store.uri}: wait for its end.")
        yield


def _made(
    plan: GenerationPlan, tasks: list[PartTask], request: GenerateRequest, report: Report
) -> Iterator[int]:
    """Makes the parts, and yields how many images each needed."""
    if not tasks:
        return
    start = Progress(plan.count - sum(task.images for task in tasks), plan.count)
    alone = request.workers == 1 or (request.workers is None and plan.count <= IN_THIS_PROCESS)
    if alone and request.address is None:
        yield from _made_here(plan, tasks, start, report)
    else:
        with connected(request.address) as cluster:
            pool: ActorPool[PartTask] = ActorPool(
                cluster,
                GenerationActor,
                (plan,),
                describe=lambda task: f"part {task.number}",
                resume_hint="Finished parts are kept",
                workers=request.workers,
            )
            yield from (images for _, images in pool.imap_unordered(tasks, start, report))
    report(Progress(plan.count, plan.count))


def _made_here(plan: GenerationPlan, tasks: list[PartTask], start: Progress, report: Report) -> Iterator[int]:
    before = torch.get_num_threads()
    done = start.done

    def count(images: int) -> None:
        nonlocal done
        done += images
        report(Progress(done, start.total))

    deterministic_torch(1)
    maker = PartMaker(plan, 1, count)
    try:
        for task in tasks:
            yield maker.make(task)
    finally:
        maker.close()
        torch.set_num_threads(before)


class GenerationActor:
    """Actor that makes parts on one machine of a cluster."""

    def __init__(self, plan: GenerationPlan, threads: int, count: Callable[[int], None]) -> None:
        deterministic_torch(threads)
        self._maker = PartMaker(plan, threads, count)

    def run(self, task: PartTask) -> int:
        """Make a part and publish it; returns how many images were made."""
        return self._maker.make(task)
