"""The paper's network for images: a time-conditional Wide ResNet without normalisation layers.

(Gao et al. 2021, appendix B.) The second convolution of every block is initialised close to
zero, so that every block is close to its skip connection at first.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from drl_jax.errors import UserError
from drl_jax.networks.convolution import conv3x3, materialise_gradient
from drl_jax.networks.energy import Energy, from_network

leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)
fan_avg = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
near_zero = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def time_embedding(t: Num[Array, "B"], ch: int) -> Float[Array, "B ch"]:
    """Returns the sinusoidal embedding of t (Vaswani et al. 2017).

    The first half holds sin(t ω_i), the second half cos(t ω_i), where
    ω_i = 10000^(-i / (ch/2 - 1)) for i = 0..ch/2 - 1.
    """
    half = ch // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Conv(nn.Module):
    """3x3 convolution with bias; the result has the parameters' dtype.

    Attributes:
      features: number of output channels O.
      kernel_init: initialiser of the kernel [3, 3, I, O].
    """

    features: int
    kernel_init: nn.initializers.Initializer = fan_avg

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        return conv3x3(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class Block(nn.Module):
    """Residual block conditioned on time.

        h = conv1(lrelu(x)) + dense(lrelu(temb))
        block(x, temb) = skip(x) + g · (conv2(lrelu(h)) + bias)

    skip is a 3x3 convolution where the width changes and the identity elsewhere. The gain g is
    multiplied into conv2's kernel and bias once per training step (`with_gains`).

    Attributes:
      features: number of output channels O.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W I"], temb: Float[Array, "B E"]
    ) -> Float[Array, "B H W O"]:
        h = Conv(self.features, name="conv1")(leaky_relu(x))
        dense = nn.Dense(self.features, kernel_init=fan_avg, name="dense")
        h += dense(leaky_relu(temb))[:, None, None, :]
        h = materialise_gradient(h.astype(x.dtype))
        h = Conv(self.features, near_zero, name="conv2")(leaky_relu(h))
        if x.shape[-1] != self.features:
            x = Conv(self.features, name="skip")(x).astype(x.dtype)
        return materialise_gradient((h + x).astype(x.dtype))


class ResNet(nn.Module):
    """f(x, t) for images x [B, H, W, C] and levels t [B], one number per image.

    Convolutions multiply in the images' dtype, which is also that of stored activations. They
    accumulate in the parameters' dtype, which is also that of the sum over pixels and of the
    time embedding.

    Attributes:
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch; each resolution is half the
        one before.
      N: number of residual blocks per resolution.
    """

    ch: int
    mult: tuple[int, ...]
    N: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        dense = functools.partial(nn.Dense, kernel_init=fan_avg)
        temb = time_embedding(t, self.ch)
        temb = dense(4 * self.ch, name="temb_0")(temb)
        temb = dense(4 * self.ch, name="temb_1")(leaky_relu(temb))

        h = materialise_gradient(Conv(self.ch, name="conv_in")(x).astype(x.dtype))
        for resolution, m in enumerate(self.mult):
            if resolution:
                h = mean_pool(h)
            for i in range(self.N):
                h = Block(m * self.ch, name=f"level_{resolution}_block_{i}")(h, temb)
        h = jnp.sum(nn.relu(h), axis=(1, 2), dtype=temb.dtype)
        return jnp.sum(h * dense(h.shape[-1], name="head")(leaky_relu(temb)), axis=1)


def mean_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """Halves the height and width: averages 2x2 squares of pixels, without overlap."""
    # Written with slices, which XLA:TPU fuses with the neighbouring convolutions in the forward
    # and in the backward pass.
    return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4


def spectral_rule(path: str) -> Literal["normalise", "clip"] | None:
    """Returns how `spectral.normalise` treats the parameter at a path.

    Every kernel but the head's is scaled to spectral norm one. The kernel of a block's second
    convolution, which is initialised close to zero, is scaled only if its norm exceeds one.
    """
    *_, module, name = path.split("/")
    if name != "kernel" or module == "head":
        return None
    return "clip" if module == "conv2" else "normalise"


def with_gains(energy: Energy) -> Energy:
    """Adds a learned gain g per channel to the second convolution of every block.

    Since g · (conv(x, W) + b) = conv(x, g W) + g b, the gain can scale parameters instead of
    images: `normalise` multiplies W and b by g once per training step, after spectral
    normalisation.
    """

    def init(key):
        params, vectors = energy.init(key)
        for block in params.values():
            if "conv2" in block:
                block["conv2"]["g"] = jnp.ones_like(block["conv2"]["bias"])
        return params, vectors

    def normalise(params, vectors):
        params, vectors = energy.normalise(params, vectors)
        for block in params.values():
            if "conv2" in block:
                g = block["conv2"].pop("g")
                block["conv2"] = jax.tree.map(lambda p, g=g: g * p, block["conv2"])
        return params, vectors

    return energy._replace(init=init, normalise=normalise)


def require_divisible(size: int, mult: tuple[int, ...]) -> None:
    """Checks that images can be halved between all resolutions.

    Raises:
      UserError: if size is not a multiple of 2^(len(mult) - 1).
    """
    factor = 2 ** (len(mult) - 1)
    if size % factor:
        raise UserError(
            f"images of {size}x{size} cannot be halved {len(mult) - 1} times for "
            f"mult = {mult}; use a multiple of {factor}, or fewer multipliers"
        )


def energy(image_size: int, channels: int, ch: int, mult: tuple[int, ...], N: int) -> Energy:
    """Returns the paper's network for square images, with spectral normalisation.

    Args:
      image_size: height and width of the images [pixels].
      channels: number of image channels.
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch.
      N: number of residual blocks per resolution.

    Raises:
      UserError: if image_size is not a multiple of 2^(len(mult) - 1).
    """
    require_divisible(image_size, mult)
    network = ResNet(ch=ch, mult=tuple(mult), N=N)
    shape = (image_size, image_size, channels)
    return with_gains(from_network(network, shape, spectral_rule))
