"""The paper's network: a time-conditional Wide ResNet without normalisation layers.

(Gao et al. 2021, appendix B.) It is for images, and here for signals and volumes, too. The
second convolution of every block is initialised close to zero, so that every block is close to
its skip connection at first.

`cdrl_energy` is its variant in cooperative diffusion recovery likelihood (CDRL; Zhu et al.
2024), which is conditioned on noise levels that do not depend on T, and optionally on labels.
"""

import functools
import itertools
import operator
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from drl_jax.errors import UserError
from drl_jax.networks.convolution import conv3x3, materialise_gradient
from drl_jax.networks.energy import Energy, from_network, require_classes

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
    """Convolution with bias; the result has the parameters' dtype.

    The kernel has 3 taps along each spatial axis of x: it is [3, 3, I, O] for images.

    Attributes:
      features: number of output channels O.
      kernel_init: initialiser of the kernel.
    """

    features: int
    kernel_init: nn.initializers.Initializer = fan_avg

    @nn.compact
    def __call__(self, x: Float[Array, "B *S I"]) -> Float[Array, "B *S O"]:
        shape = (*(3,) * (x.ndim - 2), x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return conv3x3(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class Block(nn.Module):
    """Residual block conditioned on time.

        h = conv1(lrelu(x)) + dense(lrelu(temb))
        block(x, temb) = skip(x) + g · (conv2(lrelu(h)) + bias)

    skip is a `Conv` where the width changes and the identity elsewhere. The gain g is
    multiplied into conv2's kernel and bias once per training step (`with_gains`). conv2 is
    initialised close to zero.

    In CDRL, h = conv1(lrelu(x)) + lrelu(dense(lrelu(temb))), and conv2 is initialised like
    conv1.

    Attributes:
      features: number of output channels O.
      cdrl: whether this is CDRL's block.
    """

    features: int
    cdrl: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *S I"], temb: Float[Array, "B E"]
    ) -> Float[Array, "B *S O"]:
        h = Conv(self.features, name="conv1")(leaky_relu(x))
        dense = nn.Dense(self.features, kernel_init=fan_avg, name="dense")
        projection = dense(leaky_relu(temb))
        if self.cdrl:
            projection = leaky_relu(projection)
        h += jnp.expand_dims(projection, range(1, x.ndim - 1))
        h = materialise_gradient(h.astype(x.dtype))
        h = Conv(self.features, fan_avg if self.cdrl else near_zero, name="conv2")(
            leaky_relu(h)
        )
        if x.shape[-1] != self.features:
            x = Conv(self.features, name="skip")(x).astype(x.dtype)
        return materialise_gradient((h + x).astype(x.dtype))


class ResNet(nn.Module):
    """f(x, t) for examples x [B, ..., C] and levels t [B], one number per example.

    Examples are images [H, W, C], signals [L, C] or volumes [D, H, W, C].

    CDRL's network is f(x, level, label). Its blocks differ (see `Block`), its head has no bias,
    and a dense layer of the one-hot label is added to the time embedding.

    Convolutions multiply in x's dtype, which is also that of stored activations. They
    accumulate in the parameters' dtype, which is also that of the sum over pixels and of the
    time embedding.

    Attributes:
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch; each resolution is half the
        one before.
      N: number of residual blocks per resolution.
      cdrl: whether this is CDRL's network.
      classes: number of classes; 0 if there are no labels.
    """

    ch: int
    mult: tuple[int, ...]
    N: int
    cdrl: bool = False
    classes: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *S C"],
        t: Num[Array, "B"],
        label: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B"]:
        """Evaluates the network.

        Args:
          x: images, signals or volumes.
          t: level; in CDRL a noise level in 0..1000 (`NoiseSchedule.conditioning`).
          label: class of each example, in 1..classes, or 0 for no label; None is 0 for all.
        """
        require_classes(self, label)
        dense = functools.partial(nn.Dense, kernel_init=fan_avg)
        temb = time_embedding(t, self.ch)
        temb = dense(4 * self.ch, name="temb_0")(temb)
        temb = dense(4 * self.ch, name="temb_1")(leaky_relu(temb))
        if self.classes:
            temb += dense(4 * self.ch, name="y_map")(one_hot(label, self.classes, temb))

        h = materialise_gradient(Conv(self.ch, name="conv_in")(x).astype(x.dtype))
        for resolution, m in enumerate(self.mult):
            if resolution:
                h = mean_pool(h)
            for i in range(self.N):
                name = f"level_{resolution}_block_{i}"
                h = Block(m * self.ch, self.cdrl, name=name)(h, temb)
        h = jnp.sum(nn.relu(h), axis=range(1, h.ndim - 1), dtype=temb.dtype)
        head = dense(h.shape[-1], use_bias=not self.cdrl, name="head")
        return jnp.sum(h * head(leaky_relu(temb)), axis=1)


def one_hot(
    label: Int[Array, "B"] | None, classes: int, like: Float[Array, "B _"]
) -> Float[Array, "B {classes}+1"]:
    """Returns one-hot labels.

    Args:
      label: class of each example, in 1..classes, or 0 for no label; None is 0 for all.
      classes: number of classes.
      like: an array with one row per example and the dtype of the result.
    """
    if label is None:
        label = jnp.zeros(len(like), jnp.int32)
    return jax.nn.one_hot(label, classes + 1, dtype=like.dtype)


def mean_pool(x: Float[Array, "B *S C"]) -> Float[Array, "B *H C"]:
    """Halves every spatial axis: averages squares of 2x2 pixels (or pairs, or cubes)."""
    # Written with slices, which XLA:TPU fuses with the neighbouring convolutions in the forward
    # and in the backward pass.
    halves = itertools.product((slice(0, None, 2), slice(1, None, 2)), repeat=x.ndim - 2)
    return functools.reduce(operator.add, (x[:, *half] for half in halves)) / 2 ** (x.ndim - 2)


def spectral_rule(path: str) -> Literal["normalise", "clip"] | None:
    """Returns how `spectral.normalise` treats the parameter at a path.

    Every kernel but the head's is scaled to spectral norm one. The kernel of a block's second
    convolution, which is initialised close to zero, is scaled only if its norm exceeds one.
    """
    *_, module, name = path.split("/")
    if name != "kernel" or module == "head":
        return None
    return "clip" if module == "conv2" else "normalise"


def cdrl_spectral_rule(path: str) -> Literal["normalise"] | None:
    """Returns the same for CDRL's network: every kernel but the head's is normalised."""
    return "normalise" if spectral_rule(path) else None


def with_gains(energy: Energy) -> Energy:
    """Adds a learned gain g per channel to the second convolution of every block.

    Since g · (conv(x, W) + b) = conv(x, g W) + g b, the gain can scale parameters instead of
    activations: `normalise` multiplies W and b by g once per training step, after spectral
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


def require_divisible(length: int, mult: tuple[int, ...], patch: int = 1) -> None:
    """Checks that examples can be halved between all resolutions.

    Args:
      length: length of every spatial axis, a multiple of `patch` [pixels].
      mult: multipliers, one per resolution.
      patch: number of pixels along each axis that the first resolution treats as one.

    Raises:
      UserError: if length is not a multiple of patch times 2^(len(mult) - 1).
    """
    halvings = len(mult) - 1
    factor = patch * 2**halvings
    if length % factor:
        times = "once" if halvings == 1 else f"{halvings} times"
        patches = f" and patches of length {patch}" if patch > 1 else ""
        raise UserError(
            f"examples of length {length} cannot be halved {times} for mult = {mult}{patches}; "
            f"use a multiple of {factor}, such as {(length // factor + 1) * factor}, or fewer "
            "multipliers"
        )


def energy(
    image_size: int, channels: int, ch: int, mult: tuple[int, ...], N: int, axes: int = 2
) -> Energy:
    """Returns the paper's network, with spectral normalisation.

    Args:
      image_size: length of every spatial axis [pixels].
      channels: number of channels of an example.
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch.
      N: number of residual blocks per resolution.
      axes: number of spatial axes: 1 for signals, 2 for square images, 3 for cubes.

    Raises:
      UserError: if image_size is not a multiple of 2^(len(mult) - 1).
    """
    require_divisible(image_size, mult)
    network = ResNet(ch=ch, mult=tuple(mult), N=N)
    shape = (image_size,) * axes + (channels,)
    return with_gains(from_network(network, shape, spectral_rule))


def cdrl_energy(
    image_size: int,
    channels: int,
    ch: int,
    mult: tuple[int, ...],
    N: int,
    levels: Float[Array, "T"],
    classes: int = 0,
    axes: int = 2,
) -> Energy:
    """Returns CDRL's network, with spectral normalisation.

    Args:
      image_size: length of every spatial axis [pixels].
      channels: number of channels of an example.
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch.
      N: number of residual blocks per resolution.
      levels: input of the network for each level t in 0..T-1, in 0..1000
        (`NoiseSchedule.conditioning`).
      classes: number of classes; 0 if there are no labels.
      axes: number of spatial axes: 1 for signals, 2 for square images, 3 for cubes.

    Raises:
      UserError: if image_size is not a multiple of 2^(len(mult) - 1).
    """
    require_divisible(image_size, mult)
    network = ResNet(ch=ch, mult=tuple(mult), N=N, cdrl=True, classes=classes)
    shape = (image_size,) * axes + (channels,)
    return with_gains(from_network(network, shape, cdrl_spectral_rule, levels))
