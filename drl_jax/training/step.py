"""One training step: a pure function of state and batch, and its compiled program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from drl_jax import diffusion, noise, recovery, standardisation
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import UserError
from drl_jax.method import Method
from drl_jax.networks import initialiser
from drl_jax.networks.energy import Params
from drl_jax.runtime import sharding
from drl_jax.runtime.matmul_precision import full_precision
from drl_jax.sampling import ladder
from drl_jax.training import state as train_state
from drl_jax.training.state import TrainState


class Statistics(NamedTuple):
    """Per-example statistics of a training step, before reduction.

    `f_neg`, `displacement` and `acceptance` are None for an objective without a chain, and
    `initialiser_loss` is None without an initialiser.

    Attributes:
      t: level.
      loss: loss.
      f_pos: output of the network for the positive sample.
      f_neg: output of the network for the negative sample, the end of the chain.
      displacement: Euclidean distance from x_tilde to the end of the chain.
      acceptance: mean acceptance probability of the chain's steps.
      initialiser_loss: squared distance from the start of the chain to its end.
    """

    t: Int[Array, "B"]
    loss: Float[Array, "B"]
    f_pos: Float[Array, "B"]
    f_neg: Float[Array, "B"] | None = None
    displacement: Float[Array, "B"] | None = None
    acceptance: Float[Array, "B"] | None = None
    initialiser_loss: Float[Array, "B"] | None = None


class Metrics(NamedTuple):
    """Metrics of a training step: means over the batch.

    No number is NaN unless something is wrong, so that training can run with JAX_DEBUG_NANS.

    Attributes:
      loss: mean over all examples.
      grad_norm: Euclidean norm of the gradient with respect to all raw parameters together.
      examples: number of examples in each of the G `diffusion.level_groups`.
      f_pos, f_neg, displacement, acceptance, initialiser_loss: means of the `Statistics` of the
        same names, one for each group, 0 for a group without examples; None where the statistic
        is None.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    examples: Float[Array, "G"]
    f_pos: Float[Array, "G"]
    f_neg: Float[Array, "G"] | None = None
    displacement: Float[Array, "G"] | None = None
    acceptance: Float[Array, "G"] | None = None
    initialiser_loss: Float[Array, "G"] | None = None


# (keys [B], normalised parameters, data x [B, ...], levels t [B], method, labels [B] or None)
#   -> (gradient of the mean loss with respect to these parameters, statistics)
Objective = Callable[
    [
        Key[Array, "B"],
        Params,
        Float[Array, "B *D"],
        Int[Array, "B"],
        Method,
        Int[Array, "B"] | None,
    ],
    tuple[Params, Statistics],
]

# 'image': data in [-1, 1], [B, ...]; and 'label', the class of each example from 1, [B], if the
# networks take labels.
Batch = dict[str, Array]

# (keys [B], data x [B, ...], levels t [B], schedule) -> positive samples y and x_tilde
Positives = Callable[
    [Key[Array, "B"], Float[Array, "B *D"], Int[Array, "B"], NoiseSchedule],
    tuple[Float[Array, "B *D"], Float[Array, "B *D"]],
]

# (keys [B], schedule) -> levels t [B] in 0..T-1
LevelDistribution = Callable[[Key[Array, "B"], NoiseSchedule], Int[Array, "B"]]


class Training(NamedTuple):
    """How a method is trained.

    Attributes:
      objective: computes the gradient of the loss.
      draw_levels: distribution of the levels.
      optimiser: turns gradients into updates.
      ema_decay: decay of the exponential moving average of the parameters.
      accumulate: number of equal parts into which each device's examples are split to save
        memory; their gradients are computed one after the other (gradient accumulation).
      matmul_precision: 'default', that of the device, or 'highest' (`full_precision`).
      label_dropout: probability with which an example's label is replaced by 0, none.
    """

    objective: Objective
    draw_levels: LevelDistribution
    optimiser: optax.GradientTransformation
    ema_decay: float
    accumulate: int = 1
    matmul_precision: str = "default"
    label_dropout: float = 0.0


def from_config(config: ConfigDict) -> Training:
    """Returns the training that a configuration describes.

    Raises:
      UserError: if the objective needs a chain and there is none, or there is an initialiser
        but chains do not start from it.
    """
    if config.initialiser.network != "none" and config.mcmc.start != "initialiser":
        raise UserError(
            f"config.mcmc.start is {config.mcmc.start!r}: training an initialiser needs "
            "'initialiser'; or set config.initialiser.network to 'none'"
        )
    if config.train.objective == "recovery" and config.mcmc.K == 0:
        raise UserError(
            "config.mcmc.K is 0: with config.train.objective 'recovery', negative samples must "
            "depend on the energy of their own level; give 1 or more steps"
        )
    objective = OBJECTIVES[config.train.objective]
    if config.train.objective == "recovery":
        objective = functools.partial(objective, positives=PAIRS[config.train.pairs])
    return Training(
        objective=objective,
        draw_levels=LEVEL_DISTRIBUTIONS[config.train.levels],
        optimiser=train_state.optimiser(config),
        ema_decay=config.optim.ema_decay,
        accumulate=config.train.accumulate,
        matmul_precision=config.train.matmul_precision,
        label_dropout=config.train.label_dropout,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    method: Method,
    training: Training,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    """Makes one step of maximum likelihood (Gao et al. 2021, algorithm 1).

    Args:
      state: state before the step.
      batch: examples, with labels if the networks take them.
      key: key of the run, into which the step and the example are folded.
      method: network, noise levels and sampler.
      training: loss, distribution of the levels, and optimiser.
      mesh: devices that share the batch.

    Returns:
      the state after the step, and the step's metrics.
    """
    B = len(batch["image"])
    keys = noise.example_keys(jax.random.fold_in(key, state.step), jnp.arange(B))
    params, normalise_vjp, vectors = jax.vjp(
        lambda raw: method.energy.normalise(raw, state.vectors),
        sharding.gather(state.params, mesh),
        has_aux=True,
    )

    def gradient(params, examples):
        keys, batch = examples
        t = training.draw_levels(noise.fold(keys, 0), method.schedule)
        label = batch.get("label")
        if label is not None:
            label = drop_labels(noise.fold(keys, 4), label, training.label_dropout)
        x = standardisation.of(jax.lax.stop_gradient(params)).apply(batch["image"])
        return training.objective(keys, params, x, t, method, label)

    def on_device(params, examples):
        return accumulate(
            functools.partial(gradient, params), params, examples, training.accumulate
        )

    grads, statistics = sharding.mean_over_examples(on_device, mesh)(params, (keys, batch))
    (grads,) = normalise_vjp(grads)
    updates, opt_state = training.optimiser.update(grads, state.opt_state, state.params)
    new_params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(new_params, state.ema, 1 - training.ema_decay)
    if standardisation.NAME in new_params:  # whose average would differ by rounding errors
        ema |= {standardisation.NAME: new_params[standardisation.NAME]}
    new_state = TrainState(
        step=state.step + 1,
        params=new_params,
        ema=ema,
        vectors=vectors,
        opt_state=opt_state,
    )
    return new_state, summarise(statistics, optax.tree.norm(grads), method.schedule.T)


def drop_labels(
    keys: Key[Array, "B"], label: Int[Array, "B"], probability: float
) -> Int[Array, "B"]:
    """Replaces each label by 0, none, with a probability (Ho and Salimans 2022)."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(dropped, 0, label)


def recovery_gradient(
    keys: Key[Array, "B"],
    params: Params,
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    method: Method,
    label: Int[Array, "B"] | None = None,
    positives: Positives = recovery.positives,
) -> tuple[Params, Statistics]:
    """Returns the gradient of the recovery likelihood's loss (Gao et al. 2021, eq. 8).

    Positive samples are diffused data. Negative samples are the ends of chains on the model's
    conditionals, with one step at least. Without a step, the negative samples of level t would
    depend on the energy of level t + 1 alone (`ladder.start_from_posterior`). Then f(., t)
    would tell two fixed distributions apart and grow without limit, instead of changing the
    samples until they are distributed like the data.

    An initialiser, if there is one, must draw the starting points ŷ of the chains. It learns
    from their ends y_K, treated as constant: its loss is |y_K - ŷ|² (Zhu et al. 2024).

    Args:
      keys: one key per example.
      params: normalised parameters, with respect to which the gradient is taken.
      x: data in [-1, 1].
      t: levels in 0..T-1.
      method: networks, noise levels and sampler.
      label: class of each example, in 1..classes, or 0 for none; None: the networks take none.
      positives: draws the positive samples and x_tilde.

    Returns:
      the gradient of the mean loss of each network, and the statistics of each example.
    """
    schedule = method.schedule
    y_pos, x_tilde = positives(noise.fold(keys, 1), x, t, schedule)
    chain_keys, dropout_keys = noise.fold(keys, 2), noise.fold(keys, 3)
    conditionals = method.conditionals(params, label=label)
    params, of_initialiser = initialiser.split(params)

    def start_of_chain(of_initialiser):
        propose = method.propose({initialiser.NAME: of_initialiser}, dropout_keys, label)
        proposing = conditionals._replace(propose=propose)
        return ladder.start_from_initialiser(chain_keys, proposing, x_tilde, t)

    start: Any = None  # that of the sampler
    if of_initialiser:
        start, start_vjp = jax.vjp(start_of_chain, of_initialiser)
    y_neg, acceptance = ladder.sample_conditional(chain_keys, conditionals, x_tilde, t, start)

    def signed_loss(params, y, sign):
        loss, f_y = recovery.loss(method.f(params, label=label), y, sign, t, schedule)
        return jnp.mean(loss), (loss, f_y)

    def gradient(y_and_sign):
        return jax.grad(signed_loss, has_aux=True)(params, *y_and_sign)

    # Positive and negative samples are processed one after the other. Their batches then have
    # the size of the chain's, so that the compiler can share the code of the network.
    samples = jnp.stack([y_pos, y_neg]), jnp.array([-1.0, 1.0], x.dtype)
    grads, (loss, (f_pos, f_neg)) = sum_gradients(gradient, params, samples)
    displacement = recovery.displacement(y_neg, x_tilde)
    loss = jnp.sum(loss, axis=0)
    statistics = Statistics(t, loss, f_pos, f_neg, displacement, acceptance)
    if not of_initialiser:
        return grads, statistics
    moved = y_neg - start
    (own_grads,) = start_vjp(-2 * moved / len(moved))  # of the mean of |y_K - ŷ|²
    own_loss = jnp.sum(jnp.square(moved), axis=range(1, moved.ndim))
    grads = grads | {initialiser.NAME: own_grads}
    return grads, statistics._replace(initialiser_loss=own_loss)


def denoising_gradient(
    keys: Key[Array, "B"],
    params: Params,
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    method: Method,
    label: Int[Array, "B"] | None = None,
) -> tuple[Params, Statistics]:
    """Returns the gradient of the denoising loss, which needs no chain.

    The loss is `recovery.denoising_loss`, with dropout if the network has it. Arguments and
    results are those of `recovery_gradient`.
    """
    schedule = method.schedule
    y, eps = recovery.positives_with_noise(noise.fold(keys, 1), x, t, schedule)
    dropout_keys = noise.fold(keys, 2)

    def mean_loss(params):
        F, f = method.F(params, dropout_keys, label), method.f(params, dropout_keys, label)
        loss = recovery.denoising_loss(F, y, eps, t, schedule)
        # f costs nothing: the loss contains it, too, and XLA computes it only once.
        return jnp.mean(loss), (loss, f(y, t))

    grads, (loss, f_pos) = jax.grad(mean_loss, has_aux=True)(params)
    return grads, Statistics(t, loss, f_pos)


def uniform_levels(keys: Key[Array, "B"], schedule: NoiseSchedule) -> Int[Array, "B"]:
    """Draws levels uniformly from 0..T-1."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.T, jnp.int32))(keys)


def log_snr_levels(keys: Key[Array, "B"], schedule: NoiseSchedule) -> Int[Array, "B"]:
    """Draws levels about uniformly in the logarithm of their signal-to-noise ratio.

    Level t has probability ∝ 1 - SNR_{t+1} / SNR_t = sigma_{t+1}² / sigma_bar_{t+1}², where
    SNR_t = a_bar_t² / sigma_bar_t². For small steps this is log SNR_t - log SNR_{t+1}. The mean
    denoising loss over such draws is then, up to a factor and a constant, the negative
    log-likelihood of the conditionals (Kingma et al. 2021). With T = 1000, 21% of the draws are
    among the lowest thirty levels, which determine all details finer than their noise of about
    0.1; with uniform draws it would be 3%.
    """
    log_p = 2 * jnp.log(schedule.sigma[1:] / schedule.sigma_bar[1:])
    log_p = log_p.astype(jnp.float32)  # draws are float32, whatever the schedule is
    return jax.vmap(jax.random.categorical, (0, None))(keys, log_p).astype(jnp.int32)


# The values of config.train.objective, config.train.pairs and config.train.levels.
OBJECTIVES: dict[str, Callable[..., tuple[Params, Statistics]]] = {
    "recovery": recovery_gradient,
    "denoising": denoising_gradient,
}
PAIRS: dict[str, Positives] = {
    "independent": recovery.positives,
    "shared": recovery.positives_with_shared_noise,
}
LEVEL_DISTRIBUTIONS: dict[str, LevelDistribution] = {
    "uniform": uniform_levels,
    "log_snr": log_snr_levels,
}


def accumulate(
    gradient: Callable[[Any], tuple[Params, Statistics]],
    params: Params,
    examples: Any,
    parts: int,
) -> tuple[Params, Statistics]:
    """Computes a mean gradient and per-example statistics in parts (gradient accumulation).

    The parts are processed one after the other, so the memory needed is that of one part.

    Args:
      gradient: examples -> (mean gradient, per-example statistics).
      params: parameters; the gradient has the same shapes.
      examples: pytree of arrays [B, ...].
      parts: number of parts, which must divide B.

    Returns:
      the gradient of the mean over all examples, and the statistics [B].
    """
    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), examples)
    total, statistics = sum_gradients(gradient, params, split)
    joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), statistics)
    return jax.tree.map(lambda a: a / parts, total), joined


def sum_gradients(
    gradient: Callable[[Any], tuple[Params, Any]], params: Params, items: Any
) -> tuple[Params, Any]:
    """Computes the gradients of items one after the other, and their sum.

    Args:
      gradient: item -> (gradient, auxiliary output).
      params: parameters; the gradient has the same shapes.
      items: pytree of arrays with the items along the first axis.

    Returns:
      the sum of the gradients, and the auxiliary outputs stacked along a new first axis.
    """

    def add(total, item):
        grads, auxiliary = gradient(item)
        return jax.tree.map(jnp.add, total, grads), auxiliary

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), items)


def summarise(statistics: Statistics, grad_norm: Float[Array, ""], T: int) -> Metrics:
    """Returns the means over the batch and over the examples of each group of levels.

    Args:
      statistics: statistics of each example.
      grad_norm: norm of the gradient.
      T: number of levels.
    """
    groups = diffusion.level_groups(T)
    group = statistics.t * len(groups) // T
    in_group = jax.nn.one_hot(group, len(groups), dtype=statistics.loss.dtype)
    count = jnp.sum(in_group, axis=0)

    def group_mean(values):
        return None if values is None else values @ in_group / jnp.maximum(count, 1)

    return Metrics(
        loss=jnp.mean(statistics.loss),
        grad_norm=grad_norm,
        examples=count,
        f_pos=group_mean(statistics.f_pos),
        f_neg=group_mean(statistics.f_neg),
        displacement=group_mean(statistics.displacement),
        acceptance=group_mean(statistics.acceptance),
        initialiser_loss=group_mean(statistics.initialiser_loss),
    )


def compile_step(
    mesh: Mesh, method: Method, training: Training
) -> Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Returns `train_step` as one jitted, sharded program of (state, batch, key).

    The program donates its first argument, so the caller can no longer use that state.
    """
    replicated, split = sharding.replicated(mesh), sharding.by_example(mesh)
    state_sharding = train_state.shardings(method.energy, training.optimiser, mesh)

    def step(state, batch, key):  # this name identifies the program in profiles and caches
        return train_step(state, batch, key, method, training, mesh)

    return jax.jit(
        full_precision(step) if training.matmul_precision == "highest" else step,
        in_shardings=(state_sharding, split, replicated),
        out_shardings=(state_sharding, replicated),
        donate_argnums=0,
        compiler_options=sharding.compiler_options(mesh),
    )
