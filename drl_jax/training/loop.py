"""The training loop: data, checkpoints, logs and signals around the pure training step."""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import config as config_lib
from drl_jax import diffusion, standardisation
from drl_jax import method as method_lib
from drl_jax.data import mixtures, pipeline
from drl_jax.data.sources import Source
from drl_jax.errors import DivergenceError, Interrupted, UserError, resumable
from drl_jax.method import METROPOLIS, Method
from drl_jax.model import Model
from drl_jax.networks.energy import Params
from drl_jax.plots import images
from drl_jax.plots.metric_writer import MetricWriter
from drl_jax.runtime import preemption, sharding
from drl_jax.runtime.progress import LOG_INTERVAL, bar, duration
from drl_jax.storage import checkpoints as checkpoints_lib
from drl_jax.storage import data_record, lock, runs
from drl_jax.storage.atomic import make_writable
from drl_jax.storage.checkpoints import Checkpoints
from drl_jax.storage.log_file import LogFile
from drl_jax.storage.runs import Parameters, Run
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step
from drl_jax.training.state import TrainState
from drl_jax.training.step import Metrics, Training

log = logging.getLogger(__name__)

LOG_FILE = "log.txt"  # file in the work directory with everything that has been logged


def train(
    config: ConfigDict,
    source: Source,
    workdir: epath.Path,
    resume_with_changes: bool = False,
    init_from: str | None = None,
    writer: MetricWriter | None = None,
    log_file: LogFile | None = None,
) -> Run:
    """Trains up to step `config.train.num_steps`, from the newest checkpoint if there is one.

    Args:
      config: configuration of the run.
      source: training data.
      workdir: folder for checkpoints, TensorBoard files and sample grids.
      resume_with_changes: whether the run may resume although `config` changes its training
        steps (`config.require_resumable`).
      init_from: WORKDIR or WORKDIR:STEP of another run; a new run starts from its parameters.
        Adam's moments and the number of steps start at zero.
      writer: writes to TensorBoard; None: nothing is written.
      log_file: collects the log. It is opened in the work directory when the run is known to be
        possible.

    Returns:
      the run, whose model has the averaged parameters.

    Raises:
      UserError: if the configuration, the work directory or `init_from` cannot be used, another
        run is using the work directory, there is nothing to resume with changes, or training
        diverged.
      Interrupted: if a signal stopped training; the state has been saved.
    """
    mesh = sharding.make_mesh(**config.mesh)
    sharding.require_divisible(
        config.train.batch_size, mesh, "train.batch_size", config.train.accumulate
    )
    if config.energy.parameterisation in config_lib.FITTED:
        require_enough_images(len(source), config.energy.components)
    method = method_lib.from_config(config)
    training = train_step.from_config(config)
    warn_of_early_decay(config)
    if config.data.classes and not config.train.label_dropout:
        log.warning(
            "config.train.label_dropout is 0: the density without a label, which guidance and "
            "--label=0 use, is not trained"
        )
    if config.mcmc.levels:
        raise UserError(
            f"config.mcmc.levels is {config.mcmc.levels}, but all levels are trained: set it "
            "when drawing samples"
        )
    warn_of_replicated_kernels(method, training, mesh)
    checkpoints_lib.require_usable(workdir)
    is_new = not checkpoints_lib.exist(workdir)
    if resume_with_changes and is_new:
        raise UserError(
            f"--resume_with_changes: there is no checkpoint in {workdir} to resume from; give "
            "the --workdir of a run, or omit the flag"
        )
    start = runs.load_parameters(init_from, config, mesh) if init_from and is_new else None
    make_writable(workdir)  # only now, so that mistakes found above leave no folder behind

    with lock.held(workdir), Checkpoints(workdir, config) as checkpoints:
        state = restored_state(config, method, training, checkpoints, mesh, resume_with_changes)
        if log_file:
            log_file.open(workdir / LOG_FILE)
        data_record.update(
            workdir, source, resumed=state is not None, may_differ=resume_with_changes
        )
        trains = state is None or state.step < config.train.num_steps
        if trains:
            for line in describe(config, method, source, mesh, workdir):
                log.info(line)
        if state is None:
            checkpoints.write_config()
            state = new_state(config, method, training, source, mesh, start)
        sampler = Model.create(
            method_lib.for_generation(method, config),
            generation_params(method, state, mesh),
            mesh,
            config.evaluation.batch_size,
        )
        if trains:
            writer = writer or MetricWriter(None)
            text = json.dumps(config_lib.to_json(config), indent=2)
            writer.write_texts(int(state.step), {"config": f"```json\n{text}\n```"})
            context = Context(config, method, training, sampler, workdir, checkpoints, writer)
            state = fit(state, context, source)
    params = generation_params(method, state, mesh)
    return Run(config, sampler.with_params(params), int(state.step))


class Context(NamedTuple):
    """Everything that the training loop uses and does not change.

    Attributes:
      config: configuration.
      method: network, noise levels and the sampler of the negative samples.
      training: loss, distribution of the levels, and optimiser.
      sampler: model for sample grids, with the sampler used in generation.
      workdir: work directory.
      checkpoints: checkpoints in the work directory.
      writer: writes to TensorBoard.
    """

    config: ConfigDict
    method: Method
    training: Training
    sampler: Model
    workdir: epath.Path
    checkpoints: Checkpoints
    writer: MetricWriter


def restored_state(
    config: ConfigDict,
    method: Method,
    training: Training,
    checkpoints: Checkpoints,
    mesh: Mesh,
    with_changes: bool = False,
) -> TrainState | None:
    """Returns the state of the newest checkpoint, sharded over the mesh; None without any.

    Logs every field of the configuration that has changed.

    Raises:
      UserError: if all checkpoints are damaged, or the run cannot resume with this
        configuration (`config.require_resumable`).
    """
    changes: list[str] = []

    def abstract_state(saved: ConfigDict) -> PyTree:
        changes[:] = config_lib.require_resumable(saved, config, with_changes)
        return train_state.abstract(method.energy, training.optimiser)

    restored = checkpoints.restore(
        abstract_state, lambda shape: sharding.fully_sharded(shape, mesh)
    )
    if not restored:
        return None
    _, state = restored
    log.info("resuming from step %d of %d", int(state.step), config.train.num_steps)
    for change in changes:
        log.info("  config.%s", change)
    return state


def new_state(
    config: ConfigDict,
    method: Method,
    training: Training,
    source: Source,
    mesh: Mesh,
    start: Parameters | None = None,
) -> TrainState:
    """Returns the state before the first step, sharded over the devices of the mesh.

    Its parameters are random, or those of another run. The standardisation and the mixture of
    the data, if the configuration has them, are fitted (`standardisation.fit`,
    `data.mixtures.fit`).

    Args:
      config: configuration.
      method: network and noise levels.
      training: the optimiser.
      source: training data.
      mesh: devices of the state.
      start: parameters of another run. Differences of its configuration are logged.
    """
    init_key, _, _ = run_keys(config.seed)
    state = train_state.create_on(mesh, init_key, method.energy, training.optimiser)
    if start:
        log.info("starting from the parameters of another run, after %d steps", start.step)
        for change in config_lib.differences(
            dict(config_lib.flatten(start.config)), dict(config_lib.flatten(config))
        ):
            log.info("  config.%s", change)
        return dataclasses.replace(
            state, params=start.params, ema=start.ema, vectors=start.vectors
        )
    fitted = fit_to_data(config, source)

    def with_fitted(params: Params) -> Params:
        return params | jax.tree.map(
            lambda array: sharding.place(
                np.asarray(array), sharding.fully_sharded(array.shape, mesh)
            ),
            fitted,
        )

    return dataclasses.replace(
        state, params=with_fitted(state.params), ema=with_fitted(state.ema)
    )


def fit_to_data(config: ConfigDict, source: Source) -> Params:
    """Returns the parameters that are fitted to the data before the first step.

    They are a standardisation and a mixture of Gaussians, if the configuration has them.
    Uniform noise of dequantisation adds its variance to that of the mixture.

    Raises:
      UserError: if a feature is constant, or fewer examples can be read than the mixture has
        components.
    """
    fitted: Params = {}
    if config.data.standardise:
        found = standardisation.fit(pipeline.batches_in_order(config, source))
        fitted = standardisation.with_standardisation(fitted, found)
    if config.energy.parameterisation in config_lib.FITTED:
        x = pipeline.load_examples(config, source, least=config.energy.components)
        x = standardisation.of(fitted).apply(x)
        mixture = mixtures.fit(x, config.energy.components)
        mixture = mixture.diffused(1.0, config.data.dequantise / math.sqrt(12))
        fitted = method_lib.with_mixture(fitted, mixture)
    return fitted


def warn_of_early_decay(config: ConfigDict) -> None:
    """Logs that the last steps have no effect if the learning rate is zero before the end."""
    end, num_steps = config.optim.decay_steps, config.train.num_steps
    if 0 < end < num_steps:
        log.warning(
            "the learning rate is zero from step %d on, so the rest of the %d steps have no "
            "effect: use --config.optim.decay_steps=%d, or 0 for a constant learning rate",
            end,
            num_steps,
            num_steps,
        )


def warn_of_replicated_kernels(method: Method, training: Training, mesh: Mesh) -> None:
    """Logs which kernels cannot be split over the `fsdp` devices, so that each holds a copy."""
    params = train_state.abstract(method.energy, training.optimiser).params
    names = train_state.replicated_kernels(params, mesh)
    if not names:
        return
    more = f" and {len(names) - 4} more" if names[4:] else ""
    log.warning(
        "config.mesh.fsdp = %d divides no axis of %s%s: every device holds a copy of these",
        mesh.shape[sharding.FSDP],
        ", ".join(names[:4]),
        more,
    )


def require_enough_images(n: int, components: int) -> None:
    """Raises `UserError` if there are fewer images than components of the mixture."""
    if n < components:
        raise UserError(
            f"config.energy.components is {components}, but there are only {n} training "
            f"images; use {n} or fewer"
        )


def run_keys(seed: int) -> Key[Array, "3"]:
    """Returns the random keys of a run: initial parameters, training steps, sample grids."""
    return jax.random.split(jax.random.key(seed), 3)


def fit(state: TrainState, context: Context, source: Source) -> TrainState:
    """Makes the remaining steps and returns the state after them.

    A state is saved only after the next step has shown that its loss has not diverged.
    Therefore one more step is made at the end, and its update is discarded.

    Args:
      state: state before the first of these steps. It is donated.
      context: everything else that the steps use.
      source: training data.

    Raises:
      UserError: if training diverged.
      Interrupted: if a signal stopped training; the state has been saved.
    """
    config, mesh = context.config, context.sampler.mesh
    split = sharding.by_example(mesh)
    _, step_key, sample_key = run_keys(config.seed)
    step_fn = train_step.compile_step(mesh, context.method, context.training)
    copy = jax.jit(
        lambda state: jax.tree.map(jnp.copy, state),
        out_shardings=train_state.shardings(
            context.method.energy, context.training.optimiser, mesh
        ),
    )
    start, end = int(state.step), config.train.num_steps
    limits = divergence_limits(config, math.prod(context.method.energy.shape))
    batches = pipeline.training_batches(
        config, source, start, jax.process_index(), jax.process_count()
    )

    def advance(state: TrainState) -> tuple[TrainState, Metrics]:
        batch = {
            name: jax.make_array_from_process_local_data(split, array)
            for name, array in next(batches).items()
        }
        return step_fn(state, batch, step_key)

    def check(step: int, metrics: Metrics, before: TrainState | None) -> Metrics:
        """Waits for the metrics of a step, checks them, and saves the state `before` the step.

        Args:
          step: number of steps made before it.
          metrics: metrics of the step.
          before: state to save; None if no checkpoint is due.

        Returns:
          the metrics as numpy arrays.
        """
        metrics = jax.tree.map(np.asarray, metrics)
        raise_if_diverged(step, metrics, limits)
        if before is not None:
            context.checkpoints.save(step, before)
        return metrics

    with contextlib.ExitStack() as stack:
        writer = context.writer
        progress = stack.enter_context(Progress(start, config, writer))
        received_signal: Callable[[], int | None] = lambda: None  # noqa: E731
        signum = None
        unchecked: tuple[int, Metrics, TrainState | None] | None = None
        log.info("compiling the training step")
        for step in range(start, end):
            if signum := received_signal():
                break
            save = step > start and step % config.checkpoint.every_steps == 0
            before = copy(state) if save else None  # the step donates its state
            state, metrics = advance(state)
            if step == start:
                # Signals are caught only from here on: during the compilation of the first step
                # there is nothing to save, so a signal may end the process at once.
                received_signal = stack.enter_context(preemption.stop_on_signal())
            # Reading metrics waits for the devices. Those of the previous step are read, so
            # that the devices always have a step to work on.
            if unchecked:
                progress.add(check(*unchecked))
            unchecked = step, metrics, before
            done = step + 1
            if done % config.log.sample_every_steps == 0 and done < end:
                write_grid(context, state, sample_key, done, writer)
        newest = copy(state)
        _, metrics = advance(state)
        if unchecked:
            progress.add(check(*unchecked))
        check(int(newest.step), metrics, newest)
        context.checkpoints.wait()  # while signals are still caught
        if signum:
            raise Interrupted(signum, resumable(int(newest.step)))
    return newest


def generation_params(method: Method, state: TrainState, mesh: Mesh) -> Params:
    """Returns the averaged, normalised parameters of a training state."""
    return runs.generation_params(method.energy, state.ema, state.vectors, mesh)


def write_grid(
    context: Context, state: TrainState, key: Key[Array, ""], step: int, writer: MetricWriter
) -> None:
    """Draws samples with the averaged parameters; writes them to TensorBoard and to grids/.

    If the networks take labels, the samples are of each class in turn.

    Args:
      context: everything else that is needed.
      state: training state after `step` steps.
      key: random key of the samples, the same for all steps.
      step: number of steps made.
      writer: writes to TensorBoard.

    Raises:
      UserError: if the PNG file cannot be written.
    """
    params = generation_params(context.method, state, context.sampler.mesh)
    model = context.sampler.with_params(params)
    samples = model.sample(key, images.grid_size(model.shape, columns=8))
    if not np.isfinite(samples).all():
        log.warning(
            "the samples after step %d are not finite numbers: if later ones are not, either, "
            "lower --config.mcmc.b_squared or --config.optim.learning_rate",
            step,
        )
    grid = images.picture(samples, columns=8)
    writer.write_images(step, {"samples": grid[None]})
    folder = context.workdir / "grids"
    make_writable(folder)
    images.write_png(folder / f"{step:08d}.png", grid)


class Limits(NamedTuple):
    """The largest |loss| and |f| of a run that has not diverged."""

    loss: float
    f: float


def divergence_limits(config: ConfigDict, dimension: int) -> Limits:
    """Returns the limits of the configuration for examples of D = `dimension` numbers.

    `config.train.loss_limit` and `config.train.energy_limit` are the limits up to D = 64 (8x8
    grey images). For larger D they grow in proportion to D, because f does: f is a log-density,
    which is a sum over the pixels, times a constant per level. The recovery loss is a
    difference of two values of f, so it grows as well, and the rounding errors of f in float32
    remain the same fraction of it. The denoising loss is a mean over the pixels, so its limit
    does not grow.
    """
    growth = max(1.0, dimension / 64)
    summed = config.train.objective == "recovery"
    return Limits(
        loss=config.train.loss_limit * (growth if summed else 1.0),
        f=config.train.energy_limit * growth,
    )


def raise_if_diverged(step: int, metrics: Metrics, limits: Limits) -> None:
    """Raises if the loss or the energies exceed their limits, or a number is not finite.

    Args:
      step: number of steps made before this one.
      metrics: metrics of the step, as numpy arrays.
      limits: largest permitted |loss| and |f|.

    Raises:
      DivergenceError: with the values, and what to try.
    """
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    f = float(max(np.abs(f).max() for f in (metrics.f_pos, metrics.f_neg) if f is not None))
    finite = all(math.isfinite(value) for value in (loss, f, grad_norm))
    if finite and abs(loss) <= limits.loss and f <= limits.f:
        return
    raise DivergenceError(
        f"training diverged at step {step}: loss {loss:.3g} (limit {limits.loss:g}), "
        f"|f| {f:.3g} (limit {limits.f:g}), gradient norm {grad_norm:.3g}; try a smaller "
        "--config.optim.learning_rate or --config.mcmc.b_squared, or more chain steps "
        "(--config.mcmc.K). If there are checkpoints, they precede the divergence: add "
        "--resume_with_changes to go on from the newest"
    )


class Progress:
    """Reports the progress of training: as a bar or log lines, and as scalars for TensorBoard.

    The bar is shown on a terminal; without one, lines are logged, at the latest every
    `LOG_INTERVAL` seconds. Speeds do not include the first step, most of whose time is
    compilation. Use it as a context manager.
    """

    def __init__(self, start: int, config: ConfigDict, writer: MetricWriter):
        """Prepares the reports.

        Args:
          start: number of steps made already.
          config: configuration. Reports are means over the last `log.every_steps` steps.
          writer: writes the scalars.
        """
        self._groups = diffusion.level_groups(config.diffusion.T)
        self._names = ["f_pos", "f_neg", "displacement"]
        if config.mcmc.sampler in METROPOLIS:  # the others accept every step
            self._names.append("acceptance")
        if config.initialiser.network != "none":
            self._names.append("initialiser_loss")
        self._learning_rate = train_state.learning_rate(config)
        self._batch_size = config.train.batch_size
        self._done, self._end = start, config.train.num_steps
        self._every, self._writer = config.log.every_steps, writer
        self._bar: tqdm | None = None
        self._recent: list[Metrics] = []
        self._timed_from = start, math.nan  # number of steps, time
        self._last_line = math.nan

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of one step, as numpy arrays."""
        self._done += 1
        self._recent.append(metrics)
        if self._bar is None:
            self._bar = bar(initial=self._done, total=self._end, unit="step", smoothing=0.1)
            self._last_line = time.monotonic()
            self._timed_from = self._done, self._last_line
        else:
            self._bar.update()
        self._bar.set_postfix(loss=f"{metrics.loss:.4f}", refresh=False)
        if self._done % self._every == 0 or self._done == self._end:
            self._report()
        elif time.monotonic() - self._last_line > LOG_INTERVAL:
            self._log(self._speed())

    def _speed(self) -> float | None:
        """Returns the number of steps per second since the last report; None if not known."""
        steps, then = self._timed_from
        return (self._done - steps) / (time.monotonic() - then) if self._done > steps else None

    def _log(self, speed: float | None) -> None:
        """Logs a line, unless there is a bar."""
        if self._bar is None or not self._bar.disable:
            return
        self._last_line = time.monotonic()
        words = [f"step {self._done}/{self._end}"]
        if speed:
            left = duration((self._end - self._done) / speed)
            words += [f"{speed:.{1 if speed >= 1 else 3}f} steps/s", f"{left} left"]
        loss = np.mean([metrics.loss for metrics in self._recent])
        log.info("  ".join([*words, f"loss {loss:.5f}"]))

    def _report(self) -> None:
        """Reports the means of the metrics and the speed since the last report."""
        speed = self._speed()
        scalars: dict[str, Any] = {
            "loss": np.mean([metrics.loss for metrics in self._recent]),
            "grad_norm": np.mean([metrics.grad_norm for metrics in self._recent]),
            "learning_rate": self._learning_rate(self._done - 1),
        }
        if speed:
            scalars["steps_per_second"] = speed
            scalars["examples_per_second"] = speed * self._batch_size
        for name in self._names:
            means = mean_of_groups(self._recent, name)
            for levels, value in zip(self._groups, means, strict=False):
                if np.isfinite(value):
                    scalars[f"{name}/level_{levels[0]}"] = value
        self._writer.write_scalars(self._done, scalars)
        self._log(speed)
        self._recent = []
        self._timed_from = self._done, time.monotonic()


def mean_of_groups(metrics: Sequence[Metrics], name: str) -> Float[np.ndarray, "G"]:
    """Returns the means of one of the metrics over the examples of several steps.

    Args:
      metrics: metrics of the steps, as numpy arrays.
      name: name of the metric, which has one value for each group of levels.

    Returns:
      one mean for each of the groups, NaN for a group without examples; [0] without a chain.
    """
    if getattr(metrics[0], name) is None:
        return np.zeros(0)
    count = np.stack([step.examples for step in metrics])
    total = np.sum(count * np.stack([getattr(step, name) for step in metrics]), axis=0)
    n = np.sum(count, axis=0)
    return np.where(n, total / np.maximum(n, 1), np.nan)


def describe(
    config: ConfigDict, method: Method, source: Source, mesh: Mesh, workdir: epath.Path
) -> list[str]:
    """Returns lines that describe a run: devices, data, network, steps and output."""
    processes = jax.process_count()
    n = sum(
        math.prod(a.shape)
        for a in jax.tree.leaves(
            jax.eval_shape(lambda key: method.energy.init(key)[0], jax.random.key(0))
        )
    )
    shape = "x".join(map(str, method.energy.shape))
    return [
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}"
        + f", {processes} processes" * (processes > 1),
        f"data     {config.data.name}: {len(source):,} examples of shape {shape}",
        f"network  {config.energy.network}: {n:,} parameters, {config.diffusion.T} levels",
        f"steps    {config.train.num_steps:,}, of {config.train.batch_size} examples each",
        f"output   {workdir}",
    ]
