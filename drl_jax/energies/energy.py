"""A network f(x, t) as pure functions of its parameters.

The sign: f is the negative energy, so p ∝ exp(F) with F = f / s_t² (`recovery`), and higher
means more probable.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from drl_jax.energies import spectral

Params = dict[str, Any]  # nested by module; leaves are arrays
Vectors = dict[str, Float[Array, "_"]]  # by the path of the kernel they belong to


class Energy(NamedTuple):
    """A network without its parameters.

    Attributes:
      init: key -> (params, vectors), the vectors of the power iterations.
      normalise: (params, vectors) -> (params, vectors): spectral normalisation, once a
        training step; f takes the normalised parameters.
      f: (params, x [B, ...], t [B]) -> [B].
      shape: of one example.
    """

    init: Callable[[Key[Array, ""]], tuple[Params, Vectors]]
    normalise: Callable[[Params, Vectors], tuple[Params, Vectors]]
    f: Callable[[Params, Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B"]]
    shape: tuple[int, ...]


def from_network(network: nn.Module, shape: tuple[int, ...], rule: spectral.Rule) -> Energy:
    """Returns the energy of a flax module (x, t) -> [B], normalised as the rule says."""

    def init(key):
        params_key, vectors_key = jax.random.split(key)
        example = jnp.zeros((1, *shape)), jnp.zeros((1,), jnp.int32)
        params = network.init(params_key, *example)["params"]
        return params, spectral.init_vectors(vectors_key, params, rule)

    def normalise(params, vectors):
        return spectral.normalise(params, vectors, rule)

    def f(params, x, t):
        return network.apply({"params": params}, x, t)

    return Energy(init, normalise, f, shape)


def computed_in(dtype: DTypeLike, energy: Energy) -> Energy:
    """Returns the energy with f computed in `dtype`, from its images on.

    What f gives, and so its gradient, has the images' own precision again: what is made of
    it, F, a chain and its noise, keeps theirs. Parameters and their gradients keep their own:
    a network multiplies in the precision of its images, and adds up in its parameters'.
    """

    def f(params, x, t):
        return energy.f(params, x.astype(dtype), t).astype(x.dtype)

    return energy._replace(f=f)
