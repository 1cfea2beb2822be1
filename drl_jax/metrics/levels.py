"""Statistics of each level's energy, on data and on the ends of chains that sample it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from drl_jax import diffusion, noise, recovery
from drl_jax.model import Model
from drl_jax.sampling import ladder

STATISTICS = ("f_data", "f_chain", "displacement", "acceptance")


def level_statistics(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "n *D"]
) -> dict[str, list[float]]:
    """Returns the statistics of each level, as means over the data.

    Every example is diffused to a level t (y, `recovery.positives`) and to level t + 1
    (x_tilde). A chain that starts at x_tilde samples p(y | x_tilde), as in training.

    With many levels, only the first of each of the `diffusion.level_groups` is evaluated.

    Args:
      model: the model.
      key: random key.
      x: data, images in [-1, 1] or points.

    Returns:
      lists with one number per evaluated level:
        level: t.
        f_data: f(y, t).
        f_chain: f at the end of the chain; equal to f_data once the level has been learned.
        displacement: Euclidean distance between the start and the end of the chain.
        acceptance: acceptance probability of the chain.
    """
    method, engine = model.method, model.engine

    def program(shared, examples):
        params, tuning, key, level = shared
        indices, x = examples
        keys = noise.example_keys(key, indices)
        t = jnp.full(indices.shape, level)
        y_pos, x_tilde = recovery.positives(noise.fold(keys, 0), x, t, method.schedule)
        y_neg, acceptance = ladder.sample_conditional(
            noise.fold(keys, 1), method.conditionals(params, tuning), x_tilde, t
        )
        f = functools.partial(method.energy.f, params)
        moved = recovery.displacement(y_neg, x_tilde)
        return f(y_pos, t), f(y_neg, t), moved, acceptance

    compiled = engine.compile(program)
    levels = [group[0] for group in diffusion.level_groups(method.schedule.T)]
    statistics: dict[str, list[float]] = {"level": [float(t) for t in levels]}
    statistics |= {name: [] for name in STATISTICS}
    for level in levels:
        shared = model.params, method.sampler.tuning, jax.random.fold_in(key, level), level
        batches = engine.run(compiled, shared, engine.split((np.arange(len(x)), x)))
        for name, values in zip(STATISTICS, zip(*batches, strict=True), strict=True):
            statistics[name].append(float(np.mean(np.concatenate(values))))
    return statistics
