"""How each level's energies meet data and chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from drl_jax import noise, parallel, recovery, train_step
from drl_jax.model import Model


def level_statistics(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "n H W C"]
) -> dict[str, list[float]]:
    """Returns, a level: mean f of data and of chains' ends, how far chains go, acceptance.

    Each image x is diffused to every level and recovered from the one above, as in training.
    Where f of the data and f of the chains agree, the level is learned. Of many levels, the
    first of each of the `train_step.level_groups` stands for it.
    """
    method, mesh, n = model.method, model.mesh, len(x)

    def on_device(shared, examples):
        params, key, level = shared
        indices, x = examples
        keys = noise.example_keys(jax.random.fold_in(key, level), indices)
        t = jnp.full(indices.shape, level)
        y_pos, x_tilde = train_step.positives(noise.fold(keys, 0), x, t, method.schedule)
        y_neg, acceptance = train_step.negatives(
            noise.fold(keys, 1), params, x_tilde, t, method
        )
        f = functools.partial(method.energy.f, params)
        moved = recovery.displacement(y_neg, x_tilde)
        return f(y_pos, t), f(y_neg, t), moved, acceptance

    at_level = jax.jit(parallel.over_examples(on_device, mesh))
    rows = np.arange(-(-n // mesh.size) * mesh.size)  # filled up with copies, to be dropped
    examples = parallel.place((rows, x[np.minimum(rows, n - 1)]), parallel.by_example(mesh))
    levels = [group[0] for group in train_step.level_groups(method.schedule.T)]
    names = ("f_data", "f_chain", "displacement", "acceptance")
    statistics: dict[str, list[float]] = {"level": [float(t) for t in levels]}
    statistics |= {name: [] for name in names}
    for level in levels:
        values = parallel.fetch(at_level((model.params, key, level), examples))
        for name, value in zip(names, values, strict=True):
            statistics[name].append(float(np.mean(value[:n])))
    return statistics
