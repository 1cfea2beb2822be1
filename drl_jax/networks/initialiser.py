"""The initialiser g(x_{t+1}, t + 1): a network that predicts where the chains of a level end.

A chain that starts near its end needs fewer steps (Zhu et al. 2024; Xie et al. 2020). Like f, g
is a pure function of its parameters, which are stored with those of f, under the name `NAME`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Key

from drl_jax.networks.energy import Energy, Params, label_argument, level_input

NAME = "initialiser"  # of its parameters among those of a model


class Initialiser(NamedTuple):
    """A network, separate from its parameters.

    Attributes:
      init: key -> initial parameters.
      g: (parameters, x_tilde = x_{t+1} [B, ...], t [B], keys [B] or None, label [B] or None)
        -> prediction of y [B, ...]. Keys and labels are those of `Energy.f`.
    """

    init: Callable[[Key[Array, ""]], Params]
    g: Callable[..., Float[Array, "B *D"]]


def from_network(
    network: nn.Module,
    shape: tuple[int, ...],
    levels: Float[Array, "T"],
    dtype: DTypeLike = jnp.float32,
) -> Initialiser:
    """Returns the initialiser g = x_tilde + U(x_tilde, level) of a network U.

    Args:
      network: maps (x [B, ...], level [B], keys [B] or None) to an array of x's shape; if it
        has classes, it takes a label [B] too.
      shape: shape of one example.
      levels: input of the network for x_{t+1}, for each t in 0..T-1.
      dtype: in which the network multiplies.
    """

    def init(key):
        return network.init(key, jnp.zeros((1, *shape)), levels[:1])["params"]

    def g(params, x_tilde, t, keys=None, label=None):
        level, labels = level_input(levels, t, x_tilde), label_argument(network, label)
        x = x_tilde.astype(dtype) if dtype != jnp.float32 else x_tilde
        u: Any = network.apply({"params": params}, x, level, keys, **labels)
        return x_tilde + u.astype(x_tilde.dtype)

    return Initialiser(init, g)


def joined(energy: Energy, initialiser: Initialiser) -> Energy:
    """Returns the energy, with the initialiser's parameters among its own.

    They are not spectrally normalised.
    """

    def init(key):
        energy_key, initialiser_key = jax.random.split(key)
        params, vectors = energy.init(energy_key)
        return params | {NAME: initialiser.init(initialiser_key)}, vectors

    def normalise(params, vectors):
        own, of_initialiser = split(params)
        own, vectors = energy.normalise(own, vectors)
        return own | {NAME: of_initialiser}, vectors

    return energy._replace(init=init, normalise=normalise)


def split(params: Params) -> tuple[Params, Params]:
    """Returns the parameters of the energy, and those of the initialiser, {} without one."""
    own = {name: value for name, value in params.items() if name != NAME}
    return own, params.get(NAME, {})
