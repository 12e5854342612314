"""The rows and the randomness of each step on the training device, made one step ahead, in either version of the draws.

1  the loader's threads draw posterior samples, and a thread the noise and times of the whole batch, all on the CPU;
2  stored uint8 or float16 rows go to the device as they are, and all that is drawn is drawn there, for the rank's own rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.objectives import Batch, Draws
from soflow_core.random_source import DrawsVersion
from soflow_pipelines.shards.loader import LoadedBatch, ShardLoader
from soflow_pipelines.shards.training_rows import training_rows
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import Checkpoint
from soflow_platform.training.step_noise import StepNoisePrefetcher

DRAWS: dict[str, DrawsVersion] = {"generator": 1, "counter": 2}
"""Values of `training.draws`, and the versions that checkpoints record."""


def draws_version(
    experiment: Experiment, device: torch.device, checkpoint: Checkpoint | None
) -> DrawsVersion:
    """How the numbers of a training are drawn: as they were before its checkpoint, else as the settings say.

    Raises JobError where the settings name another version than the checkpoint's, or one that the method lacks.
    """
    chosen = DRAWS.get(experiment.training.draws)
    objective = experiment.objective
    if chosen == 2 and not objective.draws_by_rows:
        raise JobError(
            f"training.draws is counter and {objective.method} has a `draw` of its own, which takes a generator: give it `draw_from`, "
            "or set training.draws to auto."
        )
    if checkpoint is None:
        return chosen or (2 if device.type == "cuda" and objective.draws_by_rows else 1)
    # Checkpoints before the second version do not say.
    began = checkpoint.state.draws or 1
    names = {number: name for name, number in DRAWS.items()}
    if began not in names:
        raise JobError(
            f"{checkpoint.location} was made by a later version, whose draws (version {began}) are not known here: go on with that "
            "version."
        )
    if chosen not in (None, began):
        raise JobError(
            f"training.draws is {experiment.training.draws} and this trial began with {names[began]}, whose numbers are others: set it "
            f"to auto or {names[began]}, or train this as another sweep."
        )
    return DRAWS[names[began]]


class StepInputs(ABC):
    """Batch and draws of each step, in order."""

    @property
    @abstractmethod
    def consumed(self) -> int:
        """Samples of all ranks up to the last batch that was taken."""

    @abstractmethod
    def rows(self) -> Batch:
        """The next step's rows of this rank."""

    @abstractmethod
    def draws(self, step: int) -> Draws:
        """The draws of `step`, to be called after its `rows`."""

    @abstractmethod
    def close(self) -> None:
        """Stop the threads."""


class HostInputs(StepInputs):
    """Version 1: everything is drawn on the CPU."""

    def __init__(self, loader: ShardLoader, conditional: bool, draw: Callable[[int], Draws]) -> None:
        self._loader, self._conditional = loader, conditional
        self._noise = StepNoisePrefetcher(draw)

    @property
    def consumed(self) -> int:
        return self._loader.consumed

    def rows(self) -> Batch:
        loaded = next(self._loader)
        return Batch(loaded.x0, loaded.labels if self._conditional else None)

    def draws(self, step: int) -> Draws:
        return self._noise.get(step)

    def close(self) -> None:
        self._loader.close()
        self._noise.close()


@dataclass(frozen=True)
class _Ahead:
    """What was made for a step, and when the device has it."""

    batch: Batch
    draws: Draws
    consumed: int
    ready: torch.cuda.Event | None


class DeviceInputs(StepInputs):
    """Version 2: a thread loads the next step's rows and has them and its draws made on the device.

    On a GPU its work goes to a stream of its own, beside the kernels of the step before.
    """

    def __init__(
        self,
        loader: ShardLoader,
        seed: int,
        conditional: bool,
        draw: Callable[[int], Draws],
        device: torch.device,
    ) -> None:
        """`draw` makes the draws of a step, counted from 1, on the device. The loader must not have been read from."""
        loader.posterior = "stored"
        self._loader, self._seed, self._conditional, self._draw = loader, seed, conditional, draw
        self._device, self._consumed = device, loader.consumed
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inputs")
        self._step: int | None = None
        self._next: Future[_Ahead] | None = None
        self._taken: _Ahead | None = None

    def begin(self, step: int) -> None:
        """Start on the inputs of the first step."""
        self._step, self._next = step, self._thread.submit(self._make, step)

    @property
    def consumed(self) -> int:
        return self._consumed

    def rows(self) -> Batch:
        assert self._next is not None
        assert self._step is not None
        self._taken = taken = self._next.result()
        self._step += 1
        self._next = self._thread.submit(self._make, self._step)
        self._consumed = taken.consumed
        if taken.ready is not None:
            # The step's kernels wait for the copies, and the memory is not given away before the kernels are done.
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(taken.ready)
            for tensor in (*vars(taken.batch).values(), *vars(taken.draws).values()):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)
        return taken.batch

    def draws(self, step: int) -> Draws:
        assert self._taken is not None
        assert self._step == step + 1
        return self._taken.draws

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loader.close()

    def _make(self, step: int) -> _Ahead:
        if self._stream is None:
            return self._made(step)
        with torch.cuda.stream(self._stream):
            return self._made(step, self._stream)

    def _made(self, step: int, stream: torch.cuda.Stream | None = None) -> _Ahead:
        draws = self._draw(step)
        loaded: LoadedBatch = next(self._loader)
        x0 = training_rows(loaded.x0, loaded.positions, self._loader.info, self._seed, self._device)
        batch = Batch(x0, loaded.labels if self._conditional else None).to(self._device)
        ready = None if stream is None else stream.record_event()
        return _Ahead(batch, draws, self._loader.consumed, ready)
