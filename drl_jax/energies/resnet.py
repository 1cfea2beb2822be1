"""The paper's network for images: a Wide ResNet with time, and no normalisation layers.

(Gao et al. 2021, appendix B.) The second convolution of a block starts near zero, so the
network starts as its skip connections.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drl_jax.energies.convolution import conv3x3, whole_gradient
from drl_jax.energies.energy import Energy, from_network
from drl_jax.errors import UserError

leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)
fan_avg = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
near_zero = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def time_embedding(t: Int[Array, "B"], ch: int) -> Float[Array, "B ch"]:
    """Returns the sinusoids of t: half sines, then half cosines (Vaswani et al. 2017)."""
    half = ch // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Conv(nn.Module):
    """3x3 convolution with bias.

    What it gives has the parameters' precision, whatever the images have.
    """

    features: int
    kernel_init: nn.initializers.Initializer = fan_avg

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        return conv3x3(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class Block(nn.Module):
    """Residual block with time.

    skip(x) + g · (conv(lrelu(h)) + bias),   h = conv(lrelu(x)) + dense(lrelu(temb)),
    where skip is a 3x3 convolution if the width changes and the identity if not. The gain g
    is multiplied into the kernel and the bias beforehand (`with_gains`).
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W I"], temb: Float[Array, "B E"]
    ) -> Float[Array, "B H W O"]:
        h = Conv(self.features, name="conv1")(leaky_relu(x))
        dense = nn.Dense(self.features, kernel_init=fan_avg, name="dense")
        h += dense(leaky_relu(temb))[:, None, None, :]
        h = whole_gradient(h.astype(x.dtype))
        h = Conv(self.features, near_zero, name="conv2")(leaky_relu(h))
        if x.shape[-1] != self.features:
            x = Conv(self.features, name="skip")(x).astype(x.dtype)
        return whole_gradient((h + x).astype(x.dtype))


class ResNet(nn.Module):
    """f(x, t): images [B, H, W, C] and levels [B] to one number an image.

    Products are of numbers in the images' precision, which activations have between blocks
    and convolutions; sums, and what meets no image, have the parameters'.

    Attributes:
      ch: width at the first resolution.
      mult: width at each resolution in units of ch; each halves the image of the one before.
      N: residual blocks a resolution.
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

        h = whole_gradient(Conv(self.ch, name="conv_in")(x).astype(x.dtype))
        for level, m in enumerate(self.mult):
            if level:
                h = mean_pool(h)
            for i in range(self.N):
                h = Block(m * self.ch, name=f"level_{level}_block_{i}")(h, temb)
        h = jnp.sum(nn.relu(h), axis=(1, 2), dtype=temb.dtype)
        return jnp.sum(h * dense(h.shape[-1], name="head")(leaky_relu(temb)), axis=1)


def mean_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """Averages each 2x2 square of pixels."""
    # As slices, TPUs fuse it with the convolutions beside it, in both directions.
    return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4


def spectral_rule(path: str):
    """Returns how `spectral.normalise` treats the parameter at a path.

    Every kernel but the head's is scaled to norm one; the second of a block, which starts
    near zero, only ever down to it.
    """
    *_, module, name = path.split("/")
    if name != "kernel" or module == "head":
        return None
    return "down_to_one" if module == "conv2" else "to_one"


def with_gains(energy: Energy) -> Energy:
    """Gives the second convolution of every block a gain g, learned a channel.

    Since g · (conv(x, W) + b) = conv(x, g W) + g b, it is a factor of parameters, not of
    images: it is multiplied in once a step, after they are normalised.
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
    """Refuses an image size that cannot be halved between the resolutions.

    Raises:
      UserError: with the size and the nearest that works.
    """
    factor = 2 ** (len(mult) - 1)
    if size % factor:
        raise UserError(
            f"images of {size}x{size} cannot be halved {len(mult) - 1} times for "
            f"mult = {mult}: use a multiple of {factor}, or fewer multipliers"
        )


def energy(image_size: int, channels: int, ch: int, mult: tuple[int, ...], N: int) -> Energy:
    """Returns the paper's network for square images, spectrally normalised.

    Raises:
      UserError: if the image size cannot be halved len(mult) - 1 times.
    """
    require_divisible(image_size, mult)
    network = ResNet(ch=ch, mult=tuple(mult), N=N)
    shape = (image_size, image_size, channels)
    return with_gains(from_network(network, shape, spectral_rule))
