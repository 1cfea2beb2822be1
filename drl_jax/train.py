"""The training loop: where the pure step meets data, checkpoints, logs and signals."""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import metric_writers
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import config as config_lib
from drl_jax import data, images, method, model, parallel, train_state, train_step
from drl_jax.checkpoints import Checkpoints
from drl_jax.errors import Interrupted, UserError
from drl_jax.model import Model
from drl_jax.train_state import TrainState
from drl_jax.train_step import Metrics

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: epath.Path) -> Model:
    """Trains to `config.train.num_steps`, going on from the newest checkpoint if any.

    Returns the model with the averaged parameters.

    Raises:
      UserError: the configuration, data or work directory cannot be used, or the loss
        diverged.
      Interrupted: a signal asked for the end; the state is saved.
    """
    mesh = parallel.make_mesh()
    parallel.require_divisible(config.train.batch_size, mesh, "train.batch_size")
    learned = method.from_config(config)
    data.open_source(config)
    optimiser = train_state.optimiser(config)
    whole, split = parallel.replicated(mesh), parallel.by_example(mesh)
    init_key, step_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)

    def abstract_state(saved: ConfigDict) -> TrainState:
        config_lib.require_resumable(saved, config)
        return model.abstract_state(config)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, config))
        restored = checkpoints.restore(abstract_state, whole)
        if restored is None:
            fresh = train_state.create(init_key, learned.energy, optimiser)
            state = jax.device_put(fresh, whole)
        else:
            state = restored[1]
            log.info("going on from step %d", int(state.step))
        start, end = int(state.step), config.train.num_steps

        step_fn = train_step.compile_for(mesh, learned, optimiser, config.optim.ema_decay)
        sampler = Model(learned, state.ema, mesh, config.evaluation.batch_size)
        writer = metric_writers.create_default_writer(str(workdir), just_logging=False)
        stack.enter_context(metric_writers.ensure_flushes(writer))
        progress = stack.enter_context(Progress(start, end, config.log.every_steps, writer))
        stop = stack.enter_context(stop_on_signal())
        batches = data.training_batches(config, start, jax.process_index(), jax.process_count())

        unread: tuple[int, Metrics] | None = None
        for step in range(start, end):
            x = jax.make_array_from_process_local_data(split, next(batches)["image"])
            state, metrics = step_fn(state, x, step_key)
            # Reading a metric waits for the device, so read those of the step before.
            if unread:
                progress.read(*unread, config.train.loss_limit)
            unread = step, metrics

            done = step + 1
            saves = done % config.checkpoint.every_steps == 0 or done == end or stop
            if saves:
                progress.read(*unread, config.train.loss_limit)
                unread = None
                checkpoints.save(state)
            if stop:
                raise Interrupted(stop[0], done)
            if done % config.log.sample_every_steps == 0 and done < end:
                write_grid(sampler, state, sample_key, done, workdir, writer)
        sampler.params, _ = learned.energy.normalise(state.ema, state.vectors)
    return sampler


def write_grid(
    sampler: Model,
    state: TrainState,
    key: jax.Array,
    step: int,
    workdir: epath.Path,
    writer: metric_writers.MetricWriter,
) -> None:
    """Samples 64 images with the averaged parameters, for TensorBoard and for the eye."""
    sampler.params, _ = sampler.method.energy.normalise(state.ema, state.vectors)
    sheet = images.grid(sampler.sample(key, 64), columns=8)
    writer.write_images(step, {"samples": sheet[None]})
    images.write_png(workdir / "grids" / f"{step:08d}.png", sheet)


class Progress:
    """What people see of a run: a bar on a terminal, plain lines in a log, scalars.

    Reads every step's metrics and refuses to go on when they diverge.
    """

    def __init__(
        self, start: int, end: int, every_steps: int, writer: metric_writers.MetricWriter
    ):
        self._end, self._every, self._writer = end, every_steps, writer
        self._bar = tqdm(initial=start, total=end, unit="step", disable=None, smoothing=0.05)
        self._recent: list[Metrics] = []
        self._since = (start, time.monotonic())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def read(self, step: int, metrics: Metrics, loss_limit: float) -> None:
        """Takes in the metrics of a step (0-based), waiting for the device if it must.

        Raises:
          UserError: if they are not finite, or |loss| is above the limit.
        """
        metrics = jax.tree.map(np.asarray, metrics)
        loss = float(metrics.loss)
        if not (abs(loss) <= loss_limit and math.isfinite(metrics.grad_norm)):
            raise UserError(
                f"training diverged at step {step}: loss {loss:.3g}, gradient norm "
                f"{float(metrics.grad_norm):.3g} (limit on |loss|: {loss_limit:g}). Try a "
                "smaller config.optim.learning_rate or more chain steps (config.mcmc.K) in "
                "a new --workdir"
            )
        self._recent.append(metrics)
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update()
        done = step + 1
        if done % self._every == 0 or done == self._end:
            self._report(done)

    def _report(self, done: int) -> None:
        mean = jax.tree.map(lambda *v: nan_mean(np.stack(v)), *self._recent)
        self._recent = []
        before, then = self._since
        self._since = done, time.monotonic()
        rate = (done - before) / (self._since[1] - then)
        scalars = {"loss": mean.loss, "grad_norm": mean.grad_norm, "steps_per_second": rate}
        for name in ("f_pos", "f_neg", "displacement"):
            for t, value in enumerate(getattr(mean, name)):
                if np.isfinite(value):
                    scalars[f"{name}/level_{t}"] = value
        self._writer.write_scalars(done, scalars)
        left = time.strftime("%H:%M:%S", time.gmtime((self._end - done) / rate))
        if self._bar.disable:
            log.info(
                "step %d/%d  %.1f steps/s  %s left  loss %.5f",
                *(done, self._end, rate, left, mean.loss),
            )


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is left."""
    count = np.sum(np.isfinite(values), axis=0)
    return np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list, so that the loop can end between two steps."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {
        s: signal.signal(s, lambda signum, _: received.append(signum)) for s in signals
    }
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
