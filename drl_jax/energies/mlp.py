"""A network for vectors: the image network's time embedding on dense layers."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drl_jax.energies.energy import Energy, from_network
from drl_jax.energies.resnet import leaky_relu, time_embedding


class MLP(nn.Module):
    """f(x, t): vectors [B, D] and levels [B] to one number a vector.

    Smooth (swish), since a Langevin chain follows its gradient.

    Attributes:
      width: of every hidden layer.
      depth: number of residual hidden layers.
    """

    width: int = 128
    depth: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        temb = nn.Dense(self.width, name="temb_0")(time_embedding(t, self.width))
        temb = nn.Dense(self.width, name="temb_1")(leaky_relu(temb))
        h = nn.Dense(self.width, name="dense_in")(x)
        for i in range(self.depth):
            update = nn.swish(h) + nn.Dense(self.width, name=f"time_{i}")(leaky_relu(temb))
            h += nn.Dense(self.width, name=f"dense_{i}")(nn.swish(update))
        head = nn.Dense(self.width, name="head")(leaky_relu(temb))
        return jnp.sum(nn.swish(h) * head, axis=1)


def energy(dimension: int, width: int = 128, depth: int = 3) -> Energy:
    """Returns a network for vectors, not spectrally normalised."""
    return from_network(MLP(width, depth), (dimension,), lambda path: None)
