"""A network f(x, t) as pure functions of its parameters.

f is the *negative* energy: higher means more probable. `recovery` turns it into a log-density
F.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from drl_jax.networks import spectral

Params = dict[str, Any]  # nested by flax module; the leaves are arrays
Vectors = dict[str, Float[Array, "_"]]  # of the power iterations, by the path of their kernel


class Energy(NamedTuple):
    """A network, separate from its parameters.

    Attributes:
      init: key -> (params, vectors): raw parameters, and the vectors of the power iterations.
      normalise: (params, vectors) -> (params, vectors): applies spectral normalisation, once
        per training step, to raw parameters.
      f: (params, x [B, ...], t [B]) -> [B]: evaluates the network with normalised parameters.
      shape: shape of one example.
    """

    init: Callable[[Key[Array, ""]], tuple[Params, Vectors]]
    normalise: Callable[[Params, Vectors], tuple[Params, Vectors]]
    f: Callable[[Params, Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B"]]
    shape: tuple[int, ...]


def from_network(network: nn.Module, shape: tuple[int, ...], rule: spectral.Rule) -> Energy:
    """Returns the energy of a flax module.

    Args:
      network: maps (x [B, ...], t [B]) to [B].
      shape: shape of one example x.
      rule: which kernels are spectrally normalised, and how.
    """

    def init(key):
        params_key, vectors_key = jax.random.split(key)
        x, t = jnp.zeros((1, *shape)), jnp.zeros((1,), jnp.int32)
        params = network.init(params_key, x, t)["params"]
        return params, spectral.init_vectors(vectors_key, params, rule)

    def normalise(params, vectors):
        return spectral.normalise(params, vectors, rule)

    def f(params, x, t):
        return network.apply({"params": params}, x, t)

    return Energy(init, normalise, f, shape)


def with_dtype(dtype: DTypeLike, energy: Energy) -> Energy:
    """Returns the energy with f computed in `dtype`.

    f casts x to `dtype` and its result back to x's dtype, so that the gradient in x, the
    log-density F, the chains and their noise keep x's dtype. Parameters and their gradients
    keep theirs: a network multiplies in the dtype of its images and accumulates in that of its
    parameters.
    """

    def f(params, x, t):
        return energy.f(params, x.astype(dtype), t).astype(x.dtype)

    return energy._replace(f=f)
