"""Spectral normalisation as a pure function of parameters (Miyato et al. 2018).

Divides a kernel W, reshaped to a matrix [-1, out], by its largest singular value sigma: the
rows are the inputs I of a dense layer, or the taps and input channels of a convolution. Power
iteration estimates sigma from a vector u [out] that is carried from one training step to the
next. Normalising once per training step, and not in every forward pass, keeps the energy
function fixed throughout a chain.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Key, PyTree

EPSILON = 1e-6  # added to sigma, to avoid division by zero

# Maps the path of a parameter to its treatment: "normalise" divides a kernel by sigma, "clip"
# divides it by max(sigma, 1), None leaves the parameter unchanged.
Rule = Callable[[str], Literal["normalise", "clip"] | None]


def init_vectors(
    key: Key[Array, ""], params: PyTree[Float[Array, "..."]], rule: Rule
) -> dict[str, Float[Array, "_"]]:
    """Returns a random unit vector u [out] for each kernel that the rule normalises."""
    flat = traverse_util.flatten_dict(params, sep="/")
    names = [name for name in flat if rule(name)]
    keys = jax.random.split(key, max(len(names), 1))
    return {
        name: _unit_vector(jax.random.normal(k, flat[name].shape[-1:], jnp.float32))
        for name, k in zip(names, keys, strict=False)
    }


def normalise(
    params: PyTree[Float[Array, "..."]],
    vectors: Mapping[str, Float[Array, "_"]],
    rule: Rule,
) -> tuple[PyTree[Float[Array, "..."]], dict[str, Float[Array, "_"]]]:
    """Makes one power iteration and returns the normalised parameters and the new vectors.

        v <- W u / |W u|,   u <- Wᵀ v / |Wᵀ v|,   sigma = vᵀ W u

    For gradients, u and v are constants, but sigma depends on W.

    Args:
      params: raw parameters.
      vectors: u [out] of each kernel that the rule normalises, by its path.
      rule: which kernels are normalised, and how.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    new_vectors = {}
    for name, u in vectors.items():
        W = flat[name].reshape(-1, flat[name].shape[-1])
        v = _unit_vector(jax.lax.stop_gradient(W) @ u)
        u = _unit_vector(v @ jax.lax.stop_gradient(W))
        sigma = v @ W @ u + EPSILON
        if rule(name) == "clip":
            sigma = jnp.maximum(sigma, 1.0)  # W / max(sigma, 1) = W / sigma · min(sigma, 1)
        flat[name] = flat[name] / sigma
        new_vectors[name] = u
    return traverse_util.unflatten_dict(flat, sep="/"), new_vectors


def _unit_vector(v: Float[Array, "n"]) -> Float[Array, "n"]:
    return v * jax.lax.rsqrt(jnp.maximum(jnp.sum(v**2), 1e-12))
