"""Spectral normalisation as a pure function of parameters.

Divides a kernel W by its largest singular value sigma, found by power iteration from a
vector u that is kept between training steps (Miyato et al. 2018). Kernels are taken as
matrices [-1, out]. Normalising once a step, rather than in every forward pass, leaves the
energy one fixed function for the whole of a chain.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Key, PyTree

EPSILON = 1e-6

# What to do with the parameter at a path: scale its norm 'to_one'; scale it 'down_to_one'
# and never up; or leave it alone (None).
Rule = Callable[[str], Literal["to_one", "down_to_one"] | None]


def init_vectors(
    key: Key[Array, ""], params: PyTree[Float[Array, "..."]], rule: Rule
) -> dict[str, Float[Array, "_"]]:
    """Returns a random unit vector u [out] for each kernel that the rule normalises."""
    flat = traverse_util.flatten_dict(params, sep="/")
    names = [name for name in flat if rule(name)]
    keys = jax.random.split(key, max(len(names), 1))
    return {
        name: _unit(jax.random.normal(k, flat[name].shape[-1:], jnp.float32))
        for name, k in zip(names, keys, strict=False)
    }


def normalise(
    params: PyTree[Float[Array, "..."]],
    vectors: Mapping[str, Float[Array, "_"]],
    rule: Rule,
) -> tuple[PyTree[Float[Array, "..."]], dict[str, Float[Array, "_"]]]:
    """Returns normalised parameters and the vectors after one power iteration.

    The gradient flows through sigma = v W u, with u and v constants.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    new_vectors = {}
    for name, u in vectors.items():
        W = flat[name].reshape(-1, flat[name].shape[-1])
        v = _unit(jax.lax.stop_gradient(W) @ u)
        u = _unit(v @ jax.lax.stop_gradient(W))
        sigma = v @ W @ u + EPSILON
        if rule(name) == "down_to_one":
            sigma = jnp.maximum(sigma, 1.0)  # W / sigma · min(sigma, 1)
        flat[name] = flat[name] / sigma
        new_vectors[name] = u
    return traverse_util.unflatten_dict(flat, sep="/"), new_vectors


def _unit(v: Float[Array, "n"]) -> Float[Array, "n"]:
    return v * jax.lax.rsqrt(jnp.maximum(jnp.sum(v**2), 1e-12))
