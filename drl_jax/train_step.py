"""One training step: a pure function, and the one compiled program made of it."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise, parallel, recovery, sampling
from drl_jax.diffusion import NoiseSchedule
from drl_jax.energies.energy import Params
from drl_jax.method import Method
from drl_jax.train_state import TrainState


class Metrics(NamedTuple):
    """What a step reports, G times for the `level_groups`.

    NaN where no example of the batch met a level of the group, and where there is no chain.

    Attributes:
      loss: mean over the batch.
      grad_norm: of the loss's gradient, all parameters together.
      f_pos, f_neg: mean output of the network, on data and on the chains' ends.
      displacement: mean distance from a chain's start to its end.
      acceptance: mean probability of a chain's step to be accepted.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    f_pos: Float[Array, "G"]
    f_neg: Float[Array, "G"]
    displacement: Float[Array, "G"]
    acceptance: Float[Array, "G"]


def train_step(
    state: TrainState,
    x: Float[Array, "B *D"],
    key: Key[Array, ""],
    method: Method,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    """Makes one step of maximum likelihood (Gao et al. 2021, algorithm 1).

    Args:
      state: before the step.
      x: data in [-1, 1].
      key: the run's; the step and the example are folded into it here.
      method: the network, its loss and the way of its negatives.
      optimiser: makes an update of the gradient.
      ema_decay: of the moving average of the parameters.
      mesh: the devices that share the batch.
    """
    energy, schedule = method.energy, method.schedule
    B, T = x.shape[0], schedule.T
    keys = noise.example_keys(jax.random.fold_in(key, state.step), jnp.arange(B))
    t = draw_levels(noise.fold(keys, 0), method)
    params, vectors = energy.normalise(state.params, state.vectors)
    if method.objective == "recovery":
        y_pos, x_tilde = positives(noise.fold(keys, 1), x, t, schedule)
        y_neg, acceptance = negatives(noise.fold(keys, 2), params, x_tilde, t, method, mesh)
        examples, displacement = (y_pos, y_neg, t), recovery.displacement(y_neg, x_tilde)
    else:  # no chain: nothing to report of one
        examples = *expected_positives(noise.fold(keys, 1), x, t, schedule), t
        acceptance = displacement = jnp.full((B,), jnp.nan)

    def losses(params, examples):
        y, other, t = examples
        if method.objective == "recovery":
            f = functools.partial(energy.f, params)
            return recovery.loss(f, y, other, t, schedule)
        each = recovery.denoising_loss(method.F(params), y, other, t, schedule)
        # Computed once with the loss: XLA sees that it is the same.
        return each, (energy.f(params, other, t), jnp.full_like(each, jnp.nan))

    def mean_loss(raw_params):
        params, _ = energy.normalise(raw_params, state.vectors)
        each, f_both = parallel.over_examples(losses, mesh)(params, examples)
        return jnp.mean(each), f_both

    (loss, (f_pos, f_neg)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    new_params = optax.apply_updates(state.params, updates)
    new_state = TrainState(
        step=state.step + 1,
        params=new_params,
        ema=optax.incremental_update(new_params, state.ema, 1 - ema_decay),
        vectors=vectors,
        opt_state=opt_state,
    )

    groups = level_groups(T)
    in_group = jax.nn.one_hot(t * len(groups) // T, len(groups), dtype=x.dtype)
    count = jnp.sum(in_group, axis=0)

    def group_mean(values):
        return jnp.where(count > 0, values @ in_group / count, jnp.nan)

    metrics = Metrics(
        loss=loss,
        grad_norm=optax.tree.norm(grads),
        f_pos=group_mean(f_pos),
        f_neg=group_mean(f_neg),
        displacement=group_mean(displacement),
        acceptance=group_mean(acceptance),
    )
    return new_state, metrics


def level_groups(T: int) -> list[range]:
    """Returns the levels that are reported together: each alone, or tenths of many."""
    G = T if T <= 10 else 10
    bounds = [-(-T * g // G) for g in range(G + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def draw_levels(keys: Key[Array, "B"], method: Method) -> Int[Array, "B"]:
    """Draws a level 0..T-1 a key: uniformly, or about evenly in the log of its noise.

    For this level t has probability ∝ sigma_{t+1}² / sigma_bar_{t+1}², by which the noise grows
    there. That is one over the denoising loss's weight: a mean over such draws is, but for a
    factor, the conditionals' negative log-likelihood itself, in which no level weighs more
    than another. Drawn uniformly, the thirty lowest of a thousand levels, all that tell shapes
    finer than a tenth, would be met by 3% of the examples; so, they are by half.
    """
    T = method.schedule.T
    if method.levels == "uniform":
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, T, jnp.int32))(keys)
    log_p = 2 * jnp.log(method.schedule.sigma[1:] / method.schedule.sigma_bar[1:])
    log_p = log_p.astype(jnp.float32)  # whose noise is float32 whatever the schedule is
    return jax.vmap(jax.random.categorical, (0, None))(keys, log_p).astype(jnp.int32)


def positives(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws (y, x_tilde) of the data x at level t: what to recover, and from what."""
    x_t, x_tilde = diffusion.diffuse_pair(keys, x, t, schedule)
    return noise.per_example(schedule.a_y(t), x) * x_t, x_tilde


def expected_positives(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws x_tilde as `positives` does; y is its mean given x_tilde and the data x."""
    x_tilde = diffusion.diffuse(keys, x, t + 1, schedule)
    x_t, _ = diffusion.posterior(x, x_tilde, t, schedule)
    return noise.per_example(schedule.a_y(t), x) * x_t, x_tilde


def negatives(
    keys: Key[Array, "B"],
    params: Params,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    method: Method,
    mesh: Mesh,
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Draws y ~ p(y | x_tilde) of the model, each device its own examples' chains.

    `params` are spectrally normalised. Beside y stands the chains' acceptance.
    """

    def chains(params, examples):
        keys, x_tilde, t = examples
        return sampling.sample_conditional(
            keys, method.F(params), x_tilde, t, method.schedule, method.sampler
        )

    return parallel.over_examples(chains, mesh)(params, (keys, x_tilde, t))


def compile_for(
    mesh: Mesh,
    method: Method,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
) -> Callable[[TrainState, Array, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Returns the step as one jitted, sharded program; the state passed in is donated."""

    def step(state, x, key):
        return train_step(state, x, key, method, optimiser, ema_decay, mesh)

    whole, split = parallel.replicated(mesh), parallel.by_example(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, split, whole),
        out_shardings=whole,
        donate_argnums=0,
        compiler_options=parallel.compiler_options(mesh),
    )
