"""The training loop: where the pure step meets data, checkpoints, logs and signals."""

import contextlib
import logging
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import data, images, method, model, parallel, signals, train_state, train_step
from drl_jax.checkpoints import Checkpoints
from drl_jax.curves import Curves
from drl_jax.errors import Interrupted, UserError
from drl_jax.files import make_writable
from drl_jax.method import Method
from drl_jax.model import Model, generating_params
from drl_jax.progress import bar
from drl_jax.train_state import TrainState
from drl_jax.train_step import Metrics

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: epath.Path) -> tuple[Model, int]:
    """Trains to `config.train.num_steps`, going on from the newest checkpoint if any.

    Returns the model with the averaged parameters, and the number of steps behind them.

    Raises:
      UserError: the configuration, data or work directory cannot be used, or the loss
        diverged.
      Interrupted: a signal asked for the end; the state is saved.
    """
    mesh = parallel.make_mesh(**config.mesh)
    parallel.require_divisible(
        config.train.batch_size, mesh, "train.batch_size", config.train.parts
    )
    learned = method.from_config(config)
    data.open_source(config)
    if names := train_state.kept_whole(model.abstract_state(config).params, mesh):
        told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        log.warning(
            "config.mesh.fsdp = %d divides no axis of %s: whole on every device",
            *(config.mesh.fsdp, told),
        )
    make_writable(workdir)  # all that can be known to be wrong was found before this line

    with Checkpoints(workdir, config) as checkpoints:
        state = first_state(config, learned, checkpoints, mesh)
        sampler = Model(
            model.generating(learned, config.mcmc),
            state.ema,
            mesh,
            config.evaluation.batch_size,
        )
        if state.step < config.train.num_steps:
            state = fit(state, config, learned, sampler, workdir, checkpoints)
    sampler.params = generating_params(learned.energy, state, mesh)
    return sampler, int(state.step)


def first_state(
    config: ConfigDict, learned: Method, checkpoints: Checkpoints, mesh: Mesh
) -> TrainState:
    """Returns the state of the newest checkpoint, or a new one, spread over the devices.

    Raises:
      UserError: if the checkpoints are of another configuration, or damaged.
    """

    def abstract_state(saved: ConfigDict) -> TrainState:
        config_lib.require_resumable(saved, config)
        return model.abstract_state(config)

    restored = checkpoints.restore(
        abstract_state, lambda shape: parallel.fully_sharded(shape, mesh)
    )
    if restored:
        _, state = restored
        log.info("going on from step %d of %d", int(state.step), config.train.num_steps)
        return state
    init_key, _, _ = run_keys(config.seed)
    optimiser = train_state.optimiser(config)
    return train_state.create_on(mesh, init_key, learned.energy, optimiser)


def run_keys(seed: int) -> Key[Array, "3"]:
    """Returns the keys of a run: for the first parameters, the steps, and the sample grids."""
    return jax.random.split(jax.random.key(seed), 3)


def fit(
    state: TrainState,
    config: ConfigDict,
    learned: Method,
    sampler: Model,
    workdir: epath.Path,
    checkpoints: Checkpoints,
) -> TrainState:
    """Makes the steps that are left, and returns the state after them.

    A state is saved only when the step that starts from it has been found sound. One step
    more than asked for is made for that alone, and its update dropped.

    Raises:
      UserError: if training diverged.
      Interrupted: a signal asked for the end; the state is saved.
    """
    mesh = sampler.mesh
    split = parallel.by_example(mesh)
    _, step_key, sample_key = run_keys(config.seed)
    optimiser = train_state.optimiser(config)
    step_fn = train_step.compile_for(
        *(mesh, learned, optimiser, config.optim.ema_decay, config.train.parts)
    )
    copy = jax.jit(
        lambda state: jax.tree.map(jnp.copy, state),
        out_shardings=train_state.shardings(learned.energy, optimiser, mesh),
    )
    start, end = int(state.step), config.train.num_steps
    batches = data.training_batches(config, start, jax.process_index(), jax.process_count())

    def advance(state: TrainState) -> tuple[TrainState, Metrics]:
        x = jax.make_array_from_process_local_data(split, next(batches)["image"])
        return step_fn(state, x, step_key)

    def settle(step: int, metrics: Metrics, held: TrainState | None) -> Metrics:
        """Waits for the metrics of a step, and saves the state that it started from."""
        metrics = jax.tree.map(np.asarray, metrics)
        require_sound(step, metrics, config.train)
        if held is not None:
            checkpoints.save(held)
        return metrics

    with contextlib.ExitStack() as stack:
        curves = stack.enter_context(Curves(workdir, just_logging=jax.process_index() > 0))
        progress = stack.enter_context(
            Progress(start, end, config.log.every_steps, learned.schedule.T, curves)
        )
        stop: Callable[[], int | None] = lambda: None  # noqa: E731
        signum = None
        unsettled: tuple[int, Metrics, TrainState | None] | None = None
        for step in range(start, end):
            if signum := stop():
                break
            saves = step > start and step % config.checkpoint.every_steps == 0
            held = copy(state) if saves else None  # the step donates its state
            state, metrics = advance(state)
            if step == start:
                # Not before: compiling would hold the signal up, and nothing can be lost.
                stop = stack.enter_context(signals.stop_on_signal())
            # Reading a metric waits for the device, so read those of the step before.
            if unsettled:
                progress.add(settle(*unsettled))
            unsettled = step, metrics, held
            done = step + 1
            if done % config.log.sample_every_steps == 0 and done < end:
                write_grid(sampler, state, sample_key, done, workdir, curves)
        newest = copy(state)
        _, metrics = advance(state)
        if unsettled:
            progress.add(settle(*unsettled))
        settle(int(newest.step), metrics, newest)
        checkpoints.wait()  # while signals can do no harm
        if signum:
            raise Interrupted(signum, int(newest.step))
    return newest


def write_grid(
    sampler: Model,
    state: TrainState,
    key: jax.Array,
    step: int,
    workdir: epath.Path,
    curves: Curves,
) -> None:
    """Samples a picture with the averaged parameters, for TensorBoard and for the eye."""
    sampler.params = generating_params(sampler.method.energy, state, sampler.mesh)
    n = images.shown(sampler.method.energy.shape, columns=8)
    sheet = images.picture(sampler.sample(key, n), columns=8)
    curves.write_images(step, {"samples": sheet[None]})
    folder = workdir / "grids"
    folder.mkdir(parents=True, exist_ok=True)
    images.write_png(folder / f"{step:08d}.png", sheet)


def require_sound(step: int, metrics: Metrics, limits: ConfigDict) -> None:
    """Refuses the metrics of a step whose loss, energies or gradient have exploded.

    Args:
      step: how many steps were made before it.
      metrics: of numpy arrays.
      limits: `config.train`.

    Raises:
      UserError: saying what was met, and what to try.
    """
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    # Levels that no example met are NaN; a NaN among the energies is one in the loss.
    f = float(np.nan_to_num(np.abs([metrics.f_pos, metrics.f_neg]), posinf=np.inf).max())
    if abs(loss) <= limits.loss_limit and f <= limits.energy_limit and math.isfinite(grad_norm):
        return
    raise UserError(
        f"training diverged at step {step}: loss {loss:.3g} (limit {limits.loss_limit:g}), "
        f"|f| {f:.3g} (limit {limits.energy_limit:g}), gradient norm {grad_norm:.3g}. Try a "
        "smaller --config.optim.learning_rate or more chain steps (--config.mcmc.K) in a new "
        "--workdir; what is saved here is from before"
    )


class Progress:
    """What people see of a run: a bar on a terminal, plain lines in a log, scalars."""

    def __init__(
        self,
        start: int,
        end: int,
        every_steps: int,
        T: int,
        curves: Curves,
    ):
        self._groups = train_step.level_groups(T)
        self._done, self._end, self._every, self._curves = start, end, every_steps, curves
        self._bar = bar(initial=start, total=end, unit="step", smoothing=0.1)
        self._recent: list[Metrics] = []
        self._since = (start, time.monotonic())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, metrics: Metrics) -> None:
        """Takes in the metrics, of numpy arrays, of one more step."""
        self._done += 1
        self._recent.append(metrics)
        self._bar.set_postfix(loss=f"{metrics.loss:.4f}", refresh=False)
        self._bar.update()
        if self._done % self._every == 0 or self._done == self._end:
            self._report()

    def _report(self) -> None:
        done = self._done
        mean = jax.tree.map(lambda *v: nan_mean(np.stack(v)), *self._recent)
        self._recent = []
        before, then = self._since
        self._since = done, time.monotonic()
        rate = (done - before) / (self._since[1] - then)
        scalars = {"loss": mean.loss, "grad_norm": mean.grad_norm, "steps_per_second": rate}
        for name in ("f_pos", "f_neg", "displacement", "acceptance"):
            for levels, value in zip(self._groups, getattr(mean, name), strict=True):
                if np.isfinite(value):
                    scalars[f"{name}/level_{levels[0]}"] = value
        self._curves.write_scalars(done, scalars)
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
