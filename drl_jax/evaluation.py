"""Numbers that say how good a model is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from drl_jax import noise, parallel, recovery, train_step
from drl_jax.model import Model


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Returns the squared Fréchet distance of the normal distributions fitted to a and b.

        |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^{1/2})

    (Heusel et al. 2017, eq. 6.) With S = RᵀR, the trace of the root is the sum of the
    singular values of R_a R_bᵀ: no root of a matrix, and no d x d matrix where there are
    fewer vectors than dimensions. Computed in float64.
    """
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(a), _mean_and_root(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    variances = np.sum(root_a**2) + np.sum(root_b**2)
    return float(np.sum((mean_a - mean_b) ** 2) + variances - 2 * cross)


def _mean_and_root(
    x: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "r d"]]:
    """Returns the mean and an R with RᵀR the unbiased covariance, r = min(n, d)."""
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    root = np.asarray(np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r"))
    return mean, root


def split_half_distance(x: Float[np.ndarray, "n d"], seed: int = 0) -> float:
    """Returns the Fréchet distance of two random halves: what equal distributions give."""
    order = np.random.default_rng(seed).permutation(len(x))
    half = len(x) // 2
    return frechet_distance(x[order[:half]], x[order[half:]])


def level_statistics(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "n H W C"]
) -> dict[str, list[float]]:
    """Returns, a level: mean f of data and of chains' ends, how far chains go, acceptance.

    Each image x is diffused to every level and recovered from the one above, as in training.
    Where f of the data and f of the chains agree, the level is learned. Of many levels, the
    first of each of the `train_step.level_groups` stands for it.
    """
    T, mesh = model.method.schedule.T, model.mesh
    n = len(x) // mesh.size * mesh.size
    split = parallel.by_example(mesh)

    @functools.partial(jax.jit, out_shardings=split)
    def at_level(params, x, keys, t):
        y_pos, x_tilde = train_step.positives(noise.fold(keys, 0), x, t, model.method.schedule)
        y_neg, acceptance = train_step.negatives(
            noise.fold(keys, 1), params, x_tilde, t, model.method, mesh
        )
        f = functools.partial(model.method.energy.f, params)
        moved = recovery.displacement(y_neg, x_tilde)
        return f(y_pos, t), f(y_neg, t), moved, acceptance

    levels = [group[0] for group in train_step.level_groups(T)]
    names = ("f_data", "f_chain", "displacement", "acceptance")
    statistics: dict[str, list[float]] = {"level": [float(t) for t in levels]}
    statistics |= {name: [] for name in names}
    for level in levels:
        keys = noise.example_keys(jax.random.fold_in(key, level), jnp.arange(n))
        values = at_level(model.params, x[:n], keys, jnp.full((n,), level))
        for name, value in zip(names, values, strict=True):
            statistics[name].append(float(np.mean(value)))
    return statistics


def pixel_metrics(
    samples: Float[np.ndarray, "n H W C"], data: Float[np.ndarray, "m H W C"]
) -> dict[str, Any]:
    """Returns the Fréchet distance on raw pixels in [-1, 1], and what gives it a scale.

    Beside it stand the distance of two halves of the data (what a perfect model would
    reach with as few samples) and the range of the samples' pixels.
    """
    samples_flat, data_flat = samples.reshape(len(samples), -1), data.reshape(len(data), -1)
    return {
        "pixel_frechet": frechet_distance(samples_flat, data_flat),
        "pixel_frechet_of_data_halves": split_half_distance(data_flat),
        "pixel_min": float(samples.min()),
        "pixel_max": float(samples.max()),
        "num_samples": len(samples),
        "num_data": len(data),
    }
