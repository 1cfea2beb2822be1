"""Inception-2015 network, the standard feature network of FID.

It is Inception v3 as released with TensorFlow in December 2015. It differs from later versions
of Inception v3 in having 1008 classes, average pooling that excludes the padding from the mean,
and max pooling in the last block. Modules have the names that they have in the PyTorch file of
its weights.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from drl_jax.runtime import sharding
from drl_jax.runtime.batching import Engine

SIZE = 299  # height and width of the network's input [pixels]
CLASSES = 1008

# The pixel value that becomes 0 in the network's input, by convention. TensorFlow's graph of 2015
# subtracts 128 and divides by 128. So do TF-GAN (tensorflow/gan, classifier_metrics.py, `preprocess_image`)
# and torch-fidelity.
CENTRE = 128.0
# The authors' program (ruiqigao/recovery_likelihood, eval_utils.py, `run_inception_jit`)
# subtracts 127.5 and divides by 127.5, and then calls TF-GAN's network, which resizes images
# itself. pytorch-fid (mseitzer/pytorch-fid, inception.py, `InceptionV3.forward`) does the same.
CENTRE_OF_PAPER = 127.5

# Stream of images -> batches of their features '2048' and 'logits_unbiased'. An `Extractor` is
# such a function.
FeatureFn = Callable[
    [Iterable[UInt8[np.ndarray, "H W C"]]], Iterator[dict[str, Float[np.ndarray, "B D"]]]
]

# By default, accelerators multiply float32 in lower precision, which would change FID.
PRECISION = jax.lax.Precision.HIGHEST

max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
max_pool_same = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
mean_pool_same = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


class Conv(nn.Module):
    """Convolution, batch normalisation with running statistics, and ReLU.

    Attributes:
      features: number of output channels O.
      window: height and width of the kernel.
      stride: step of the kernel along both axes.
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


downsample = functools.partial(Conv, window=(3, 3), stride=2, padding="VALID")


class BlockA(nn.Module):
    """Block at 35x35 pixels with four branches: 1x1, 5x5, two 3x3, average pooling.

    Attributes:
      pool_features: number of output channels of the pooling branch.
    """

    pool_features: int

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
                Conv(self.pool_features, name="branch_pool")(mean_pool_same(x)),
            ],
            axis=-1,
        )


class BlockB(nn.Module):
    """Block that downsamples from 35x35 to 17x17 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        h = Conv(64, name="branch3x3dbl_1")(x)
        h = Conv(96, (3, 3), name="branch3x3dbl_2")(h)
        return jnp.concatenate(
            [
                downsample(384, name="branch3x3")(x),
                downsample(96, name="branch3x3dbl_3")(h),
                max_pool(x),
            ],
            axis=-1,
        )


class BlockC(nn.Module):
    """Block at 17x17 pixels with four branches: 1x1, 7x7, two 7x7, average pooling.

    Each 7x7 convolution is factorised into a 1x7 and a 7x1 convolution.

    Attributes:
      width: number of channels inside the 7x7 branches.
    """

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
    """Block that downsamples from 17x17 to 8x8 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        h3 = Conv(192, name="branch3x3_1")(x)
        h7 = Conv(192, name="branch7x7x3_1")(x)
        h7 = Conv(192, (1, 7), name="branch7x7x3_2")(h7)
        h7 = Conv(192, (7, 1), name="branch7x7x3_3")(h7)
        return jnp.concatenate(
            [
                downsample(320, name="branch3x3_2")(h3),
                downsample(192, name="branch7x7x3_4")(h7),
                max_pool(x),
            ],
            axis=-1,
        )


class BlockE(nn.Module):
    """Block at 8x8 pixels with four branches: 1x1, 3x3, two 3x3, pooling.

    The last 3x3 convolution of a branch is replaced by a 1x3 and a 3x1 convolution in parallel.

    Attributes:
      pool: function that pools over 3x3 pixels: the maximum in the network's last block, the
        average in the one before.
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
    """Maps images of 299x299 pixels in [-1, 1] to a dictionary of features.

    '64', '192', '768' and '2048' are activations of the layers with these numbers of channels,
    averaged over the pixels. 'logits' are the class logits, and 'logits_unbiased' the same
    without the bias of the last layer, which the inception score uses.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> dict[str, Float[Array, "B D"]]:
        def mean(h: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
            return jnp.mean(h, axis=(1, 2))

        features = {}
        h = downsample(32, name="Conv2d_1a_3x3")(x)
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
    """Returns the shapes and dtypes of the network's variables."""
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(Network().init, jax.random.key(0), x)


def resize(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes images as TensorFlow 1 did: bilinear, no antialiasing, corners not aligned.

    Along each axis, pixel i of the result is the linear interpolation of the n pixels of the
    image at position i·n / size. A position beyond the last pixel takes that pixel's value.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        position = np.arange(size) * (n / size)
        low = position.astype(int)
        shape = [size if a == axis else 1 for a in range(4)]
        fraction = np.float32(position - low).reshape(shape)
        below = jnp.take(x, low, axis)
        x = below + fraction * (jnp.take(x, np.minimum(low + 1, n - 1), axis) - below)
    return x


def prepare(x: UInt8[Array, "B H W C"], centre: float = CENTRE) -> Float[Array, "B 299 299 3"]:
    """Resizes 8-bit images, and scales x to (x - centre) / centre.

    Args:
      x: images of any size, grey (C = 1) or RGB (C = 3).
      centre: pixel value that becomes 0, `CENTRE` or `CENTRE_OF_PAPER`.
    """
    rgb = jnp.broadcast_to(x, (*x.shape[:3], 3)).astype(jnp.float32)
    return (resize(rgb, SIZE) - centre) / centre


class Extractor:
    """Computes the Inception features of a stream of images."""

    def __init__(self, variables: dict[str, Any], engine: Engine, centre: float = CENTRE):
        """Compiles the network.

        Args:
          variables: weights (`weights.load`).
          engine: runs the network, `engine.batch_size` images at a time.
          centre: pixel value that becomes 0 (`prepare`).
        """
        self._engine = engine
        self._variables = jax.device_put(variables, sharding.replicated(engine.mesh))

        def program(variables, x):
            features: Any = Network().apply(variables, prepare(x, centre))
            return {name: features[name] for name in ("2048", "logits_unbiased")}

        self._compiled = engine.compile(program)

    def __call__(
        self, images: Iterable[UInt8[np.ndarray, "H W C"]]
    ) -> Iterator[dict[str, Float[np.ndarray, "B D"]]]:
        """Yields the features '2048' and 'logits_unbiased' of all images, batch by batch."""
        return self._engine.run(self._compiled, self._variables, self._engine.stack(images))
