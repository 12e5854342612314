"""The training loop of one rank: resume, then step, log, evaluate, save, until the last step or a stop.

The batch, its times and its noise are functions of (seed, step) and of the position in the global order, drawn for the whole batch
and then split over ranks, so that one worker and N workers train the same network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from soflow_core.ema import Power
from soflow_core.host_copy import HostCopy, PendingCopy
from soflow_core.objectives import Objective
from soflow_core.random_source import DrawsVersion
from soflow_core.sampling_networks import SamplingNetwork
from soflow_core.step_record import StepRecord
from soflow_core.weights import save_weights, weights_header
from soflow_platform.errors import JobError
from soflow_platform.evaluation.evaluator import Interrupted
from soflow_platform.evaluation.ranks import Ranks
from soflow_platform.storage import checkpoints
from soflow_platform.storage.ema_snapshots import snapshot_file
from soflow_platform.training import distributed
from soflow_platform.training.ema_network import ema_network
from soflow_platform.training.job import TrialJob
from soflow_platform.training.resume import load_state
from soflow_platform.training.setup import TrialSetup, data_facts
from soflow_platform.training.start import Start, describe_lineage
from soflow_platform.training.state_files import TensorFile, write_state
from soflow_platform.training.step_inputs import DeviceInputs, HostInputs, StepInputs, draws_version
from soflow_platform.training.stop_agreement import ShouldStop
from soflow_platform.training.stop_rules import broken_rule
from soflow_platform.training.stragglers import ForwardTimer
from soflow_platform.training.throughput import Throughput
from soflow_platform.training.trial_io import NullIO, RankZeroIO, TrialIO
from soflow_platform.training.trial_status import TrialState


class NonFiniteError(JobError):
    """A loss or gradient that is not finite; the update was not made."""

    own_fault = True
    """Another start computes the same numbers."""


@dataclass(frozen=True)
class Stall:
    """For how long a checkpoint stops training."""

    step: int
    seconds: float
    """Until training went on, with the copy of the state still being taken."""
    copy: PendingCopy
    """It has the seconds for which the next update waited."""


class Trainer:
    """Trains one trial, on one of its ranks."""

    def __init__(self, setup: TrialSetup, io: TrialIO) -> None:
        self.setup, self.io = setup, io
        self.experiment, self.loader, self.train_step = setup.experiment, setup.loader, setup.train_step
        self.evaluations: list[dict[str, Any]] = []
        """Step and metrics of every evaluation so far."""
        self.draws: DrawsVersion = 1
        self.inputs: StepInputs | None = None
        """Made when it is known where training begins."""
        training = setup.experiment.training
        self.steps = training.steps
        self.end = min(setup.job.until or self.steps, self.steps)
        """The step at which this start ends: the last one, or a rung at which the trial waits for others."""
        self.throughput = Throughput(
            training.batch, training.steps, setup.flops_per_image, setup.device, setup.world
        )
        # A sharded network's forward pass waits for the other ranks, so that its time tells nothing of one rank.
        timed = setup.world > 1 and training.parallel == "ddp"
        self.forward_timer = ForwardTimer(setup.train_step.network, setup.device) if timed else None
        self.should_stop = ShouldStop(setup, io)
        self.diverged: str | None = None
        """The rule of `search.stop` that ended the training."""
        self.scoring = False
        """Whether the averaged network is there and makes samples, whose memory has nothing to do with the pieces of a step."""
        self._read_rate, self._read_loss = 0.0, math.nan
        """Images per second and loss when the device was last waited for."""
        self._state_copy = HostCopy()
        self._stall: Stall | None = None
        """Of the last checkpoint, until it is logged."""

    @classmethod
    def of_job(
        cls, job: TrialJob, device: torch.device, rank: int = 0, world: int = 1, actor: Any = None
    ) -> Trainer:
        """The trainer of one rank; `actor` is the sweep's progress actor, if there is one."""
        setup = TrialSetup.build(job, device, rank, world)
        return cls(setup, RankZeroIO(setup, actor) if rank == 0 else NullIO())

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.train_step.step

    def run(self) -> bool:
        """Train to the last step, or to the step after which a stop was requested. Returns whether it was the last."""
        for _ in self.train():
            pass
        return self.step == self.steps

    def train(self) -> Iterator[dict[str, Any]]:
        """Train to the last step, a rung or a stop; yields each evaluation once it is in a checkpoint, the last when all is saved.

        Closing the iterator ends the trial as pruned.
        """
        last = self.end
        try:
            self.resume()
            yielded = len(self.evaluations)
            # One that a rule had ended stays as it is.
            owed = self.diverged is None and self._owes_evaluation()
            interrupted = owed and not self.evaluate()
            stopping = interrupted or self.diverged is not None
            if owed and not interrupted and (self.step == last or stopping):
                # The evaluation that a stop had interrupted, at a rung or as the last one: no step after it saves it.
                self.save(needed=True)
            while self.step < last and not stopping:
                try:
                    stopping = self._advance(last)
                except NonFiniteError as error:
                    if "nan" not in self.experiment.search.stop.values():
                        raise
                    # The state is that of the step before, and what there is to save of it is saved.
                    self.diverged = str(error)
                    break
                if self.step < last and not stopping:
                    yield from self.evaluations[yielded:]
                    yielded = len(self.evaluations)
            if self.diverged is not None:
                self.io.log(f"ended by search.stop: {self.diverged}", self.step)
            self._close_inputs()
            self._log_stall()
            self.io.close()
        except BaseException as error:
            self._close_inputs()
            self.io.abandon()
            if isinstance(error, GeneratorExit):
                self.io.set_state(TrialState.PRUNED, self.step)
            raise
        self.io.set_state(self._end(), self.step)
        yield from self.evaluations[yielded:]

    def _advance(self, last: int) -> bool:
        """One step, and the evaluation and the checkpoint that are due after it; whether training stops before `last`."""
        self._apply_rules(self.log(self.train_one_step()))
        evaluated = self._is_due(self.experiment.evaluation.every)
        interrupted = evaluated and not self.evaluate()
        stopping = (
            interrupted
            or (self.should_stop.after_step() and self.step < last)
            or (self.diverged is not None and self.step < self.steps)
        )
        if evaluated or stopping or self._is_saved() or self.should_stop.save_requested:
            self.should_stop.save_requested = False
            self._read()
            self.save(needed=stopping or self.step == last)
        return stopping

    def _end(self) -> TrialState:
        """How the training ended."""
        if self.step == self.steps:
            return TrialState.FINISHED
        if self.diverged is not None:
            return TrialState.PRUNED
        at_rung = self.step == self.end and not self._owes_evaluation()
        return TrialState.WAITING if at_rung else TrialState.STOPPED

    def _apply_rules(self, values: Mapping[str, float]) -> None:
        """Note where values, which are the same on every rank, break a rule of `search.stop`."""
        if self.diverged is None:
            self.diverged = broken_rule(self.experiment.search.stop, values)

    def resume(self) -> None:
        """Load the newest sound checkpoint, or begin. Every rank takes the one that rank 0 found."""
        setup = self.setup
        checkpoint = distributed.run_on_rank0(
            lambda: self.io.open(self.loader.info.digest), setup.rank, setup.world
        )
        self.draws = draws_version(self.experiment, setup.device, checkpoint)
        if checkpoint is not None:
            load_state(checkpoint, self.train_step)
            self.loader.consumed = checkpoint.state.images
            self.evaluations = checkpoint.state.evaluations
            self.diverged = checkpoint.state.ended
        else:
            with self._ema_network() as (network, _):
                if setup.rank == 0:
                    grids = setup.evaluator.grids(network, self._sampled_objective, setup.device)
                    self.io.show(0, grids)
            self._log_start()
        self.inputs = self._open_inputs()
        begin = "starting" if checkpoint is None else "going on"
        self.io.log(f"{begin} with {setup.world} worker(s) on {setup.device}", self.step)
        self.io.set_state(TrialState.RUNNING, self.step)

    def _open_inputs(self) -> StepInputs:
        setup, conditional = self.setup, self.experiment.data.conditional
        if self.draws == 1:
            return HostInputs(self.loader, conditional, setup.draw)
        inputs = DeviceInputs(
            self.loader, self.experiment.seed, conditional, setup.draw_on_device, setup.device
        )
        if self.step < self.steps:
            inputs.begin(self.step + 1)
        return inputs

    def _log_start(self) -> None:
        """Say which weights the training starts from, and what of them is not taken as it is."""
        if self.setup.job.start is None:
            return
        start = Start(**self.setup.job.start)
        self.io.log(f"weights of {describe_lineage(start.lineage)}", self.step)
        for note in start.notes(self.experiment, self.setup.config):
            self.io.log(note, self.step)

    def train_one_step(self) -> StepRecord | None:
        """One optimizer step; its record, or None while a GPU is still at it.

        Raises NonFiniteError on every rank where some rank's loss or gradient is not finite, in this step or one before it that was not
        read.
        """
        step = self.step + 1
        self._adopt_settings(step)
        if self.forward_timer is not None:
            self.forward_timer.measuring = self._is_logged(step)
        self.throughput.begin()
        assert self.inputs is not None
        batch = self.inputs.rows()
        self.throughput.loaded()
        self.train_step.start(batch, self.inputs.draws(step))
        self._log_stall()
        record = self._read() if self._is_read(step) else None
        self.throughput.end(step)
        return record

    def _is_read(self, step: int) -> bool:
        """Whether a step's numbers are waited for. A GPU goes on to the next step where they are not needed."""
        return (
            not self.train_step.runs_ahead
            or self._is_logged(step)
            or self._is_due(self.experiment.evaluation.every)
            or self._is_saved()
            or step == self.end
            or math.isnan(self._read_loss)
        )

    def _read(self) -> StepRecord | None:
        """Waits for the steps under way: the record of the last, None where there are none. Raises NonFiniteError."""
        records = self.train_step.finish()
        if records and not records[-1].finite:
            self._raise_non_finite(records[-1].step + 1, records[-1])
        return records[-1] if records else None

    def _adopt_settings(self, step: int) -> None:
        """Take the settings of a step where they have changed (`training.changes`)."""
        settings, trained = self.setup.settings_at(step), self.train_step
        if (settings.objective, settings.optimizer) != (trained.objective, trained.config.optimizer):
            trained.adopt(settings.objective, settings.optimizer)
            self.io.log("trains with the settings of training.changes", step)

    def log(self, record: StepRecord | None) -> dict[str, float]:
        """Publish a step's progress, and every so often its metrics, which are means over the ranks; these are returned.

        Of a step without a record it is known that it was started.
        """
        step, logged = self.step, self._is_logged(self.step)
        values: dict[str, float] = {}
        if record is not None:
            values = {"train/loss": record.loss, **{f"train/{name}": v for name, v in record.terms.items()}}
        if logged and self.setup.world > 1:
            rows = distributed.rows_of(self.setup.rank, self.setup.world, self.experiment.training.batch)
            values = distributed.mean_over_ranks(values, rows)
            self._log_slow_rank(step)
        if record is not None:
            self._read_rate, self._read_loss = self.throughput.images_per_second, values["train/loss"]
        eta = self.throughput.eta_seconds(step)
        self.io.progress(step, self._consumed, self._read_rate, self._read_loss, eta)
        if record is None or not logged:
            return {}
        update = {"train/grad_norm": record.grad_norm, "train/learning_rate": record.learning_rate}
        self.io.log_metrics(step, values | update | self.throughput.take(step))
        return values | update

    def _log_stall(self) -> None:
        """Log for how long the last checkpoint has stopped training, which is known after the next update."""
        if self._stall is not None:
            seconds = self._stall.seconds + self._stall.copy.held
            self.io.log_metrics(self._stall.step, {"system/checkpoint_stall_seconds": seconds})
            self._stall = None

    def evaluate(self) -> bool:
        """Score the first EMA, all ranks together.

        Returns False where a stop interrupted it: it is made when training goes on. The last step's evaluation is not interrupted.
        """
        setup, step = self.setup, self.step
        self.io.set_state(TrialState.EVALUATING, step)
        interruptible = step < self.steps
        try:
            with self._ema_network(interruptible) as (network, ranks):
                result = setup.evaluator.evaluate(network, self._sampled_objective, setup.device, ranks)
        except Interrupted:
            return False
        self.evaluations.append({"step": step, **result.metrics})
        self._apply_rules(result.metrics)
        self.io.evaluated(step, result)
        return True

    def save(self, needed: bool) -> None:
        """Copy the state to host memory, from which rank 0 publishes it. Training goes on; its next update waits for the copy.

        A checkpoint that is not `needed` is left out while the one before it is stuck.
        """
        setup, step = self.setup, self.step
        sharded = self.train_step.mesh is not None
        if setup.rank != 0 and not sharded:
            return
        started = time.perf_counter()
        ready = self.io.ready_to_save(step, needed)
        if not (distributed.broadcast_object(ready) if sharded else ready):
            return
        pending = self.train_step.start_host_state(self._state_copy)
        self._stall = Stall(step, time.perf_counter() - started, pending)
        # Weights are sampled as the sweep says, where a command says nothing else.
        objective, facts = self._sampled_objective, data_facts(self.loader.info, self.experiment)
        snapshot = self._owes_snapshot()
        ended = self.diverged if step < self.steps else None
        progress = checkpoints.CheckpointState(
            step, self._consumed, setup.job.run, draws=self.draws, ended=ended
        )

        def write_averages(folder: Path) -> None:
            state = pending.wait()
            for width in self.experiment.training.ema_profiles:
                name = Power(width).name
                tensors = {**state["network"], **state["ema"][name]}
                save_weights(folder / snapshot_file(name), tensors, setup.config, objective, facts)

        def write(folder: Path) -> dict[str, str]:
            state = pending.wait()
            if snapshot:
                # Before the checkpoint: training never goes on from a step whose snapshot is missing.
                setup.snapshots.publish(progress, write_averages)
            averaged = {**state["network"], **next(iter(state["ema"].values()))}
            header = weights_header(setup.config, objective, facts)
            return write_state(folder, state, TensorFile(averaged, header))

        self.io.save(replace(progress, evaluations=list(self.evaluations)), write)

    @property
    def _sampled_objective(self) -> Objective:
        """The method, with the settings of the present step, as its network is sampled."""
        return self.setup.settings_at(self.step).sampled_objective

    @property
    def _consumed(self) -> int:
        """Samples that all ranks have trained on: the loader's state in a checkpoint."""
        return self.loader.consumed if self.inputs is None else self.inputs.consumed

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return self.step % every == 0 or self.step == self.steps

    def _is_saved(self) -> bool:
        """Whether this step is one of those with a checkpoint, whether it is evaluated or not."""
        return self._is_due(self._save_every) or self._owes_snapshot()

    def _owes_snapshot(self) -> bool:
        """Whether this step is one of those with a snapshot of the power-function averages."""
        training = self.experiment.training
        every = training.ema_snapshot_every or self.experiment.evaluation.every
        return bool(training.ema_profiles) and self._is_due(every)

    @property
    def _save_every(self) -> int:
        return self.experiment.training.checkpoint_every or self.experiment.evaluation.every

    def _is_logged(self, step: int) -> bool:
        return step % self.experiment.training.log_every == 0 or step == 1

    def _owes_evaluation(self) -> bool:
        """Whether the checkpoint that training resumed from was made in the middle of an evaluation."""
        evaluated = self.evaluations[-1]["step"] if self.evaluations else 0
        return evaluated < self.step and self.step % self.experiment.evaluation.every == 0

    @contextmanager
    def _ema_network(self, interruptible: bool = False) -> Iterator[tuple[SamplingNetwork, Ranks]]:
        def should_stop() -> bool:
            return interruptible and self.should_stop.now()

        setup, self.scoring = self.setup, True
        ranks = setup.rank, setup.world
        with ema_network(self.train_step, setup.config, setup.device, *ranks, should_stop) as network:
            yield network
        self.scoring = False

    def _log_slow_rank(self, step: int) -> None:
        slow = self.forward_timer.slow_rank() if self.forward_timer is not None else None
        if slow is not None:
            rank, ratio = slow
            self.io.log(f"rank {rank} takes {ratio:.1f} times as long as the others for a forward pass", step)

    def _raise_non_finite(self, step: int, record: StepRecord) -> None:
        culprits = [(self.setup.rank, str(record.culprit))]
        if self.setup.world > 1:
            culprits = distributed.all_gather_list(culprits)
        # The rank whose own loss broke names a term; the others see only what reached them through the gradients.
        rank, culprit = min(culprits, key=lambda pair: pair[1].startswith("gradient"))
        kept = f" and the checkpoints before it are kept in {self.setup.checkpoints.root}"
        raise NonFiniteError(
            f"{culprit} is not finite at step {step} on rank {rank}: the update was not made{kept if self.setup.job.run else ''}."
        )

    def _close_inputs(self) -> None:
        if self.inputs is not None:
            self.inputs.close()
        self.loader.close()
