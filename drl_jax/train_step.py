"""One training step: a pure function, and the one compiled program made of it."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise, parallel, recovery, sampling, train_state
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


class Seen(NamedTuple):
    """What a step meets of each example: its level, its loss, and as in `Metrics`."""

    t: Int[Array, "B"]
    loss: Float[Array, "B"]
    f_pos: Float[Array, "B"]
    f_neg: Float[Array, "B"]
    displacement: Float[Array, "B"]
    acceptance: Float[Array, "B"]


def train_step(
    state: TrainState,
    x: Float[Array, "B *D"],
    key: Key[Array, ""],
    method: Method,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    mesh: Mesh,
    parts: int = 1,
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
      parts: of a device's examples, which it takes one after the other (`accumulate`).
    """
    keys = noise.example_keys(jax.random.fold_in(key, state.step), jnp.arange(len(x)))
    params, pull_back, vectors = jax.vjp(
        lambda raw: method.energy.normalise(raw, state.vectors),
        parallel.gather(state.params, mesh),
        has_aux=True,
    )

    def on_device(params, examples):
        return accumulate(lambda part: gradient(params, part, method), params, examples, parts)

    grads, seen = parallel.mean_over_examples(on_device, mesh)(params, (keys, x))
    (grads,) = pull_back(grads)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    new_params = optax.apply_updates(state.params, updates)
    new_state = TrainState(
        step=state.step + 1,
        params=new_params,
        ema=optax.incremental_update(new_params, state.ema, 1 - ema_decay),
        vectors=vectors,
        opt_state=opt_state,
    )
    return new_state, summary(seen, optax.tree.norm(grads), method.schedule.T)


def gradient(
    params: Params,
    examples: tuple[Key[Array, "B"], Float[Array, "B *D"]],
    method: Method,
) -> tuple[Params, Seen]:
    """Returns the gradient of the mean loss of (keys, data x), and what was met on the way.

    It is taken with respect to the parameters that f takes, spectrally normalised.
    """
    keys, x = examples
    schedule = method.schedule
    t = draw_levels(noise.fold(keys, 0), method)
    if method.objective == "recovery":
        y_pos, x_tilde = positives(noise.fold(keys, 1), x, t, schedule)
        y_neg, acceptance = negatives(noise.fold(keys, 2), params, x_tilde, t, method)

        def phase_loss(params, y, sign):
            f = functools.partial(method.energy.f, params)
            each, f_y = recovery.loss(f, y, sign, t, schedule)
            return jnp.mean(each), (each, f_y)

        def phase(y_and_sign):
            return jax.grad(phase_loss, has_aux=True)(params, *y_and_sign)

        # One after the other, in the batch of the chain: compilers share its code.
        phases = jnp.stack([y_pos, y_neg]), jnp.array([-1.0, 1.0], x.dtype)
        grads, (each, (f_pos, f_neg)) = add_up(phase, params, phases)
        displacement = recovery.displacement(y_neg, x_tilde)
        return grads, Seen(t, jnp.sum(each, axis=0), f_pos, f_neg, displacement, acceptance)

    y, x_tilde = expected_positives(noise.fold(keys, 1), x, t, schedule)
    nothing = jnp.full_like(x, jnp.nan, shape=t.shape)

    def mean_loss(params):
        each = recovery.denoising_loss(method.F(params), y, x_tilde, t, schedule)
        # Computed once with the loss: XLA sees that it is the same.
        return jnp.mean(each), (each, method.energy.f(params, x_tilde, t))

    grads, (each, f_pos) = jax.grad(mean_loss, has_aux=True)(params)
    return grads, Seen(t, each, f_pos, nothing, nothing, nothing)  # no chain, none reported


def accumulate(
    fn: Callable[[Any], tuple[Params, Seen]], params: Params, examples: Any, parts: int
) -> tuple[Params, Seen]:
    """Returns fn(examples) = (a mean like `params`, each), computed part by part.

    Memory is that of one part of the examples.
    """
    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), examples)
    total, each = add_up(fn, params, split)
    joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), each)
    return jax.tree.map(lambda a: a / parts, total), joined


def add_up(
    fn: Callable[[Any], tuple[Params, Any]], params: Params, items: Any
) -> tuple[Params, Any]:
    """Returns the sum of the first of fn(item) = (like `params`, each), and every second.

    Items are taken one after the other along the first axis of the arrays that they are in.
    """

    def add(total, item):
        term, each = fn(item)
        return jax.tree.map(jnp.add, total, term), each

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), items)


def summary(seen: Seen, grad_norm: Float[Array, ""], T: int) -> Metrics:
    """Returns the means over the batch, or over those of a group of levels."""
    groups = level_groups(T)
    in_group = jax.nn.one_hot(seen.t * len(groups) // T, len(groups), dtype=seen.loss.dtype)
    count = jnp.sum(in_group, axis=0)

    def group_mean(values):
        return jnp.where(count > 0, values @ in_group / count, jnp.nan)

    return Metrics(
        loss=jnp.mean(seen.loss),
        grad_norm=grad_norm,
        f_pos=group_mean(seen.f_pos),
        f_neg=group_mean(seen.f_neg),
        displacement=group_mean(seen.displacement),
        acceptance=group_mean(seen.acceptance),
    )


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
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Draws y ~ p(y | x_tilde) of the model; `params` are spectrally normalised.

    Beside y stands the chains' acceptance.
    """
    return sampling.sample_conditional(
        keys, method.F(params), x_tilde, t, method.schedule, method.sampler
    )


def compile_for(
    mesh: Mesh,
    method: Method,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    parts: int = 1,
) -> Callable[[TrainState, Array, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Returns the step as one jitted, sharded program; the state passed in is donated."""

    def step(state, x, key):
        return train_step(state, x, key, method, optimiser, ema_decay, mesh, parts)

    whole, split = parallel.replicated(mesh), parallel.by_example(mesh)
    carried = train_state.shardings(method.energy, optimiser, mesh)
    return jax.jit(
        step,
        in_shardings=(carried, split, whole),
        out_shardings=(carried, whole),
        donate_argnums=0,
        compiler_options=parallel.compiler_options(mesh),
    )
