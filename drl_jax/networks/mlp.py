"""A network for vectors: dense layers with the time embedding of the image network."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise
from drl_jax.networks.energy import Energy, from_network, require_classes
from drl_jax.networks.resnet import leaky_relu, one_hot, time_embedding

# Angle of the time embedding's fastest sinusoid at t = T [radians]. At one radian per level, as
# for images, neighbouring levels out of a thousand would be learned independently of each
# other, and the lowest levels, where the loss is mostly noise, would have too little data.
MAX_ANGLE = 10.0

# Standard deviation of the Fourier features' initial frequencies for points in the plane, whose
# densities have fine detail [radians per unit of x].
FREQUENCY = 3.0


def frequency(dimension: int) -> float:
    """Returns the standard deviation of the initial frequencies [radians per unit of x].

    With more than two values, an angle of data with unit variance varies by about one radian.
    With higher frequencies, the network learns a table of 13 columns and 142 rows badly.
    """
    return FREQUENCY if dimension <= 2 else dimension**-0.5


class MLP(nn.Module):
    """f(x, t) for vectors x [B, D] and levels t [B], one number per vector.

    The input is x together with learned Fourier features of it, without which fine detail takes
    long to learn (Tancik et al. 2020). The activations are smooth in x (sine, swish), since
    Langevin chains follow the gradient of f.

    Attributes:
      width: width of every hidden layer.
      depth: number of residual hidden layers.
      T: number of levels.
      dropout: probability that a hidden feature is set to zero in training.
      classes: number of classes; 0 if there are no labels. A dense layer of the one-hot label
        is added to the time embedding.
    """

    width: int
    depth: int
    T: int
    dropout: float = 0.0
    classes: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B D"],
        t: Int[Array, "B"],
        keys: Key[Array, "B"] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B"]:
        """Evaluates the network.

        Args:
          x: vectors.
          t: level, in 0..T-1.
          keys: random keys for dropout; None evaluates the network without it.
          label: class of each vector, in 1..classes, or 0 for no label; None is 0 for all.
        """
        require_classes(self, label)
        temb = time_embedding(jnp.asarray(t) * (MAX_ANGLE / self.T), self.width)
        temb = nn.Dense(self.width, name="temb_0")(temb)
        temb = nn.Dense(self.width, name="temb_1")(leaky_relu(temb))
        if self.classes:
            labels = one_hot(label, self.classes, temb)
            temb += nn.Dense(self.width, name="y_map")(labels)
        temb = leaky_relu(temb)
        angles = nn.Dense(
            self.width,
            kernel_init=nn.initializers.normal(frequency(x.shape[1])),
            bias_init=nn.initializers.uniform(2 * jnp.pi),
            name="waves",
        )
        features = jnp.concatenate([jnp.sin(angles(x)), x], axis=1)
        h = nn.Dense(self.width, name="dense_in")(features)
        for i in range(self.depth):
            update = nn.swish(h + nn.Dense(self.width, name=f"time_{i}")(temb))
            if keys is not None and self.dropout:
                update = noise.dropout(noise.fold(keys, i), update, self.dropout)
            h += nn.Dense(self.width, name=f"dense_{i}")(update)
        head = nn.Dense(self.width, name="head")(temb)
        return jnp.sum(nn.swish(h) * head, axis=1) / self.width**0.5


def energy(
    dimension: int,
    width: int = 128,
    depth: int = 3,
    T: int = 1000,
    dropout: float = 0.0,
    classes: int = 0,
) -> Energy:
    """Returns the network for vectors, without spectral normalisation.

    Args:
      dimension: D, number of coordinates of a vector.
      width: width of every hidden layer.
      depth: number of residual hidden layers.
      T: number of levels.
      dropout: probability that a hidden feature is set to zero in training.
      classes: number of classes; 0 if there are no labels.
    """
    network = MLP(width=width, depth=depth, T=T, dropout=dropout, classes=classes)
    return from_network(network, shape=(dimension,), rule=lambda path: None)
