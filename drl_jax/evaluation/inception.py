"""The Inception-2015 network, whose features everybody's FID is computed on.

It is Inception v3 as TensorFlow released it in December 2015. Beside later copies of that
network it has 1008 classes, average pools that leave the padding out of the mean, and a
maximum where the last block pools. Modules are named as in PyTorch's file of its weights.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from drl_jax import parallel

SIZE = 299  # pixels of a side, as the network was trained
CLASSES = 1008

# Accelerators would round the factors to fewer bits, and FID would be another number.
PRECISION = jax.lax.Precision.HIGHEST

max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
max_pool_same = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
mean_pool_same = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


class Conv(nn.Module):
    """Convolution, batch normalisation by running statistics, ReLU.

    Attributes:
      features: channels of the result.
      window: height and width of the kernel.
      stride: 1 keeps the size, unless padding says otherwise; 2 halves it.
      padding: 'SAME' or 'VALID'.
    """

    features: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        conv = nn.Conv(
            self.features,
            self.window,
            self.stride,
            self.padding,
            use_bias=False,
            precision=PRECISION,
            name="conv",
        )
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")
        return nn.relu(norm(conv(x)))


halving = functools.partial(Conv, window=(3, 3), stride=2, padding="VALID")


class BlockA(nn.Module):
    """35x35 pixels: windows 1, 5, two of 3, and a pool of `pooled` channels."""

    pooled: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        h5 = Conv(48, name="branch5x5_1")(x)
        h3 = Conv(64, name="branch3x3dbl_1")(x)
        h3 = Conv(96, (3, 3), name="branch3x3dbl_2")(h3)
        return jnp.concatenate(
            [
                Conv(64, name="branch1x1")(x),
                Conv(64, (5, 5), name="branch5x5_2")(h5),
                Conv(96, (3, 3), name="branch3x3dbl_3")(h3),
                Conv(self.pooled, name="branch_pool")(mean_pool_same(x)),
            ],
            axis=-1,
        )


class BlockB(nn.Module):
    """35x35 pixels to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        h = Conv(64, name="branch3x3dbl_1")(x)
        h = Conv(96, (3, 3), name="branch3x3dbl_2")(h)
        return jnp.concatenate(
            [
                halving(384, name="branch3x3")(x),
                halving(96, name="branch3x3dbl_3")(h),
                max_pool(x),
            ],
            axis=-1,
        )


class BlockC(nn.Module):
    """17x17 pixels: windows 1, 7 and two of 7, each 7x7 in two thin steps, and a pool."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        h7 = Conv(self.width, name="branch7x7_1")(x)
        h7 = Conv(self.width, (1, 7), name="branch7x7_2")(h7)
        h77 = Conv(self.width, name="branch7x7dbl_1")(x)
        h77 = Conv(self.width, (7, 1), name="branch7x7dbl_2")(h77)
        h77 = Conv(self.width, (1, 7), name="branch7x7dbl_3")(h77)
        h77 = Conv(self.width, (7, 1), name="branch7x7dbl_4")(h77)
        return jnp.concatenate(
            [
                Conv(192, name="branch1x1")(x),
                Conv(192, (7, 1), name="branch7x7_3")(h7),
                Conv(192, (1, 7), name="branch7x7dbl_5")(h77),
                Conv(192, name="branch_pool")(mean_pool_same(x)),
            ],
            axis=-1,
        )


class BlockD(nn.Module):
    """17x17 pixels to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        h3 = Conv(192, name="branch3x3_1")(x)
        h7 = Conv(192, name="branch7x7x3_1")(x)
        h7 = Conv(192, (1, 7), name="branch7x7x3_2")(h7)
        h7 = Conv(192, (7, 1), name="branch7x7x3_3")(h7)
        return jnp.concatenate(
            [
                halving(320, name="branch3x3_2")(h3),
                halving(192, name="branch7x7x3_4")(h7),
                max_pool(x),
            ],
            axis=-1,
        )


class BlockE(nn.Module):
    """8x8 pixels: windows 1, 3 and two of 3, which fork at their end, and a pool.

    Attributes:
      pool: the mean, or in the last block the maximum, of 3x3 pixels.
    """

    pool: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        h3 = Conv(384, name="branch3x3_1")(x)
        h33 = Conv(448, name="branch3x3dbl_1")(x)
        h33 = Conv(384, (3, 3), name="branch3x3dbl_2")(h33)
        return jnp.concatenate(
            [
                Conv(320, name="branch1x1")(x),
                Conv(384, (1, 3), name="branch3x3_2a")(h3),
                Conv(384, (3, 1), name="branch3x3_2b")(h3),
                Conv(384, (1, 3), name="branch3x3dbl_3a")(h33),
                Conv(384, (3, 1), name="branch3x3dbl_3b")(h33),
                Conv(192, name="branch_pool")(self.pool(x)),
            ],
            axis=-1,
        )


class Network(nn.Module):
    """Images of 299x299 in [-1, 1] to their features, by name.

    '64', '192', '768' and '2048' are means over the pixels of layers with so many channels;
    'logits' are those of the classes and 'logits_unbiased' these before the bias is added,
    which the inception score uses.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> dict[str, Float[Array, "B D"]]:
        def mean(h: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
            return jnp.mean(h, axis=(1, 2))

        features = {}
        h = halving(32, name="Conv2d_1a_3x3")(x)
        h = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(h)
        h = max_pool(Conv(64, (3, 3), name="Conv2d_2b_3x3")(h))
        features["64"] = mean(h)
        h = Conv(80, name="Conv2d_3b_1x1")(h)
        h = max_pool(Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(h))
        features["192"] = mean(h)
        h = BlockA(32, name="Mixed_5b")(h)
        h = BlockA(64, name="Mixed_5c")(h)
        h = BlockA(64, name="Mixed_5d")(h)
        h = BlockB(name="Mixed_6a")(h)
        h = BlockC(128, name="Mixed_6b")(h)
        h = BlockC(160, name="Mixed_6c")(h)
        h = BlockC(160, name="Mixed_6d")(h)
        h = BlockC(192, name="Mixed_6e")(h)
        features["768"] = mean(h)
        h = BlockD(name="Mixed_7a")(h)
        h = BlockE(mean_pool_same, name="Mixed_7b")(h)
        h = BlockE(max_pool_same, name="Mixed_7c")(h)
        features["2048"] = mean(h)
        fc = nn.Dense(CLASSES, precision=PRECISION, name="fc")
        features["logits"] = fc(features["2048"])
        features["logits_unbiased"] = features["logits"] - fc.get_variable("params", "bias")
        return features


def abstract_variables() -> dict[str, Any]:
    """Returns the shapes of the network's variables."""
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(Network().init, jax.random.key(0), x)


def resize(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes as TensorFlow 1 did: bilinear, not antialiased, the corners not aligned.

    Pixel i of the result lies at i·H / size of the image, and what lies beyond the last
    pixel is the last pixel.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        place = np.arange(size) * (n / size)
        low = place.astype(int)
        shape = [size if a == axis else 1 for a in range(4)]
        part = np.float32(place - low).reshape(shape)
        below = jnp.take(x, low, axis)
        x = below + part * (jnp.take(x, np.minimum(low + 1, n - 1), axis) - below)
    return x


def prepare(x: UInt8[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """Makes 8-bit images of any size, grey (C = 1) or RGB (C = 3), what the network takes."""
    rgb = jnp.broadcast_to(x, (*x.shape[:3], 3)).astype(jnp.float32)
    return (resize(rgb, SIZE) - 128) / 128


class Extractor:
    """The network compiled for the devices at hand."""

    def __init__(self, variables: dict[str, Any], mesh: Mesh, batch_size: int = 256):
        """Takes the weights; about `batch_size` images lie on the devices at a time."""
        self._mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._variables = jax.device_put(variables, parallel.replicated(mesh))

        def features(variables, x):
            found: Any = Network().apply(variables, prepare(x))
            return {name: found[name] for name in ("2048", "logits_unbiased")}

        self._features = jax.jit(parallel.over_examples(features, mesh))

    def __call__(
        self, images: Iterable[UInt8[np.ndarray, "H W C"]]
    ) -> Iterator[dict[str, Float[np.ndarray, "B D"]]]:
        """Yields the features '2048' and 'logits_unbiased' of all images, a batch at a time.

        A last batch that is not full is filled up with copies, which are dropped again: it
        needs no program of its own.
        """
        split = parallel.by_example(self._mesh)
        images = iter(images)
        while batch := list(itertools.islice(images, self._batch_size)):
            n = len(batch)
            rows = np.minimum(np.arange(self._batch_size), n - 1)
            x = parallel.place(np.stack(batch)[rows], split)
            found = parallel.fetch(self._features(self._variables, x))
            yield {name: value[:n] for name, value in found.items()}
