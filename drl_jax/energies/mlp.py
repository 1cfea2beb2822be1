"""A network for vectors: the image network's time embedding on dense layers."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drl_jax.energies.energy import Energy, from_network
from drl_jax.energies.resnet import leaky_relu, time_embedding

# Of the fastest sinusoid of t on the way through all levels [radians]. At one radian a level,
# as images have it, a thousand levels would be learned each by itself, and the lowest, where
# noise hides most of what there is to learn, would have too little to learn from.
WAY = 10.0
FREQUENCY = 3.0  # of the waves at the start, about [radians a unit of x]


class MLP(nn.Module):
    """f(x, t): vectors [B, D] and levels [B] to one number a vector.

    Beside x stand waves of it, without which fine shapes take long to learn (Tancik et al.
    2020). Smooth (sine, swish), since a Langevin chain follows its gradient.

    Attributes:
      width: of every hidden layer.
      depth: number of residual hidden layers.
      T: number of levels.
    """

    width: int
    depth: int
    T: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        temb = time_embedding(jnp.asarray(t) * (WAY / self.T), self.width)
        temb = nn.Dense(self.width, name="temb_0")(temb)
        temb = leaky_relu(nn.Dense(self.width, name="temb_1")(leaky_relu(temb)))
        waves = nn.Dense(
            self.width,
            kernel_init=nn.initializers.normal(FREQUENCY),
            bias_init=nn.initializers.uniform(2 * jnp.pi),
            name="waves",
        )
        seen = jnp.concatenate([jnp.sin(waves(x)), x], axis=1)
        h = nn.Dense(self.width, name="dense_in")(seen)
        for i in range(self.depth):
            update = nn.swish(h + nn.Dense(self.width, name=f"time_{i}")(temb))
            h += nn.Dense(self.width, name=f"dense_{i}")(update)
        head = nn.Dense(self.width, name="head")(temb)
        return jnp.sum(nn.swish(h) * head, axis=1) / self.width**0.5


def energy(dimension: int, width: int = 128, depth: int = 3, T: int = 1000) -> Energy:
    """Returns a network for vectors, not spectrally normalised."""
    return from_network(MLP(width, depth, T), (dimension,), lambda path: None)
