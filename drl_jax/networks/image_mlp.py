"""A multilayer perceptron for small images, signals and volumes, as vectors.

Up to about a thousand pixels, dense layers learn faster per second than convolutions, above all
on CPUs, where matrix products reach the full speed of the hardware. They have many parameters,
so with few images they need dropout.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise
from drl_jax.networks.energy import Energy, Form, from_image_to_image, require_classes
from drl_jax.networks.resnet import near_zero, one_hot, time_embedding

EMBEDDING = 64  # number of sinusoids of the level
small = nn.initializers.variance_scaling(1e-2, "fan_avg", "uniform")


class ImageMLP(nn.Module):
    """U(x, level): one or more arrays of x's shape per example.

    Residual layers with a smooth activation, whose scale and shift depend on the level. The
    last hidden layer is divided by its root mean square, so that U is bounded.

    Attributes:
      width: number of features of every hidden layer.
      depth: number of residual layers.
      dropout: probability that a hidden feature is set to zero in training.
      outputs: number O of arrays; if it is 1, U has no axis for them.
      classes: number of classes; 0 if there are no labels. A dense layer of the one-hot label
        is added to the embedding of the level.
    """

    width: int
    depth: int
    dropout: float = 0.0
    outputs: int = 1
    classes: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *D"],
        level: Float[Array, "B"],
        keys: Key[Array, "B"] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B *D"] | Float[Array, "B O *D"]:
        """Evaluates the network.

        Args:
          x: images or other arrays.
          level: noise level, in 0..1000 (`NoiseSchedule.conditioning`).
          keys: random keys for dropout; None evaluates the network without it.
          label: class of each example, in 1..classes, or 0 for no label; None is 0 for all.
        """
        require_classes(self, label)
        embedding = nn.Dense(2 * EMBEDDING, name="temb_0")(time_embedding(level, EMBEDDING))
        if self.classes:
            labels = one_hot(label, self.classes, embedding)
            embedding += nn.Dense(2 * EMBEDDING, name="y_map")(labels)
        embedding = nn.swish(nn.Dense(2 * EMBEDDING, name="temb_1")(nn.swish(embedding)))
        h = nn.Dense(self.width, name="dense_in")(x.reshape(len(x), -1))
        for i in range(self.depth):
            update = nn.Dense(self.width, name=f"first_{i}")(nn.swish(h))
            modulation = nn.Dense(2 * self.width, name=f"modulation_{i}")(embedding)
            scale, shift = jnp.split(modulation, 2, axis=1)
            update = nn.swish((1 + scale) * update + shift)
            if keys is not None and self.dropout:
                update = noise.dropout(noise.fold(keys, i), update, self.dropout)
            h += nn.Dense(self.width, kernel_init=small, name=f"second_{i}")(update)
        h = nn.swish(h)
        h /= jnp.sqrt(1 + jnp.mean(jnp.square(h), axis=1, keepdims=True))
        shape = x.shape[1:] if self.outputs == 1 else (self.outputs, *x.shape[1:])
        u = nn.Dense(int(np.prod(shape)), kernel_init=near_zero, name="dense_out")(h)
        return u.reshape(len(x), *shape)


def energy(
    shape: tuple[int, ...],
    width: int,
    depth: int,
    dropout: float,
    form: Form,
    levels: Float[Array, "T"],
    outputs: int = 1,
    classes: int = 0,
) -> Energy:
    """Returns the energy of an `ImageMLP`.

    Args:
      shape: shape of one example.
      width: number of features of every hidden layer.
      depth: number of residual layers.
      dropout: probability that a hidden feature is set to zero in training.
      form: how f follows from x and U.
      levels: input of the network for each level t in 0..T-1.
      outputs: number of arrays of x's shape in U.
      classes: number of classes; 0 if there are no labels.
    """
    network = ImageMLP(
        width=width, depth=depth, dropout=dropout, outputs=outputs, classes=classes
    )
    return from_image_to_image(network, shape, form, levels)
