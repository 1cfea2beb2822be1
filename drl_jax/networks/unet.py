"""A U-Net for images, signals and volumes: the base of an energy, and a predictor of examples.

Its blocks are those of Ho et al. (2020), conditioned on time by scale and shift (Dhariwal and
Nichol 2021), as Zhu et al. (2024) use them. The result U(x, level) has x's shape. Two functions
of it are energies whose gradient is close to U (Salimans and Ho 2021; Du et al. 2023):

    f = <x, U(x)>,   f = (|x|² - |x - U(x)|²) / 2

All operations are smooth, because training differentiates the gradient of f. U is bounded: its
last convolution reads normalised features. So f grows no faster than linearly in x, and exp(F)
can be normalised where F contains -|x|² / 2.
"""

import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from drl_jax import noise
from drl_jax.errors import UserError
from drl_jax.networks.convolution import materialise_gradient
from drl_jax.networks.energy import require_classes
from drl_jax.networks.resnet import (
    Conv,
    fan_avg,
    mean_pool,
    one_hot,
    require_divisible,
    time_embedding,
)

zeros = nn.initializers.zeros

EPSILON = 1e-6  # added to the variance in `Normalisation`


class Pointwise(nn.Module):
    """Dense layer of each pixel's channels; the result has the parameters' dtype.

    Attributes:
      features: number of output channels O.
      kernel_init: initialiser of the kernel [I, O].
    """

    features: int
    kernel_init: nn.initializers.Initializer = fan_avg

    @nn.compact
    def __call__(self, x: Float[Array, "B *S I"]) -> Float[Array, "B *S O"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,))
        return product("...i,io->...o", x, kernel, kernel.dtype) + bias


def product(subscripts: str, x: Array, other: Array, dtype: DTypeLike) -> Array:
    """Returns an `einsum` that multiplies in x's dtype and accumulates in `dtype`."""
    return jnp.einsum(subscripts, x, other.astype(x.dtype), preferred_element_type=dtype)


class Normalisation(nn.Module):
    """Group normalisation (Wu and He 2018) as an affine function of each channel.

    Returns (A, B) such that the normalised x is A x + B. The statistics and the result have the
    parameters' dtype.

    Attributes:
      groups: maximum number of groups; `gcd(groups, C)` are used, so that they are equal.
    """

    groups: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *S C"]
    ) -> tuple[Float[Array, "B *ones C"], Float[Array, "B *ones C"]]:
        C, pixels = x.shape[-1], range(1, x.ndim - 1)
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", zeros, (C,))
        x = x.astype(scale.dtype)

        def group_mean(channels):
            split = channels.reshape(len(x), math.gcd(self.groups, C), -1)
            mean = jnp.broadcast_to(jnp.mean(split, axis=2, keepdims=True), split.shape)
            return mean.reshape(len(x), *(1 for _ in pixels), C)

        # Sums over pixels first: they run along vectors of channels, and read x once.
        mean = group_mean(jnp.mean(x, axis=pixels))
        variance = group_mean(jnp.mean(jnp.square(x), axis=pixels)) - jnp.square(mean)
        A = scale * jax.lax.rsqrt(jnp.maximum(variance, 0) + EPSILON)
        return A, bias - mean * A


class Block(nn.Module):
    """Residual block conditioned on time.

        h = conv1(resample(silu(norm1(x))))
        h = conv2(dropout(silu((1 + scale) norm2(h) + shift)))
        block(x, temb) = skip(resample(x)) + h

    (scale, shift) = dense(silu(temb)), per channel. skip is a `Pointwise` where the width
    changes and the identity elsewhere. conv2 is initialised to zero.

    Attributes:
      features: number of output channels O.
      groups: maximum number of groups of a normalisation.
      dropout: probability with which an activation is set to zero.
      resample: halves or doubles every spatial axis, if given.
    """

    features: int
    groups: int
    dropout: float
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *S I"],
        temb: Float[Array, "B E"],
        keys: Key[Array, "B"] | None,
    ) -> Float[Array, "B *S2 O"]:
        A, B = Normalisation(self.groups, name="norm1")(x)
        resample = self.resample or (lambda x: x)
        h = resample(nn.silu(A * x + B).astype(x.dtype))
        h = Conv(self.features, name="conv1")(h)
        h = materialise_gradient(h.astype(x.dtype))
        dense = nn.Dense(2 * self.features, kernel_init=fan_avg, name="dense")
        modulation = jnp.expand_dims(dense(nn.silu(temb)), range(1, x.ndim - 1))
        scale, shift = jnp.split(modulation, 2, axis=-1)
        A, B = Normalisation(self.groups, name="norm2")(h)
        h = nn.silu((1 + scale) * A * h + ((1 + scale) * B + shift)).astype(x.dtype)
        if keys is not None and self.dropout:
            h = noise.dropout(keys, h, self.dropout)
        h = Conv(self.features, zeros, name="conv2")(h)
        skip = resample(x)
        if x.shape[-1] != self.features:
            skip = Pointwise(self.features, name="skip")(skip)
        return materialise_gradient((h + skip).astype(x.dtype))


class Attention(nn.Module):
    """Single-head attention between all pixels of an example, added to its input.

        q, k, v = qkv(norm(x));   x + out(softmax(q kᵀ / sqrt(C)) v)

    out is initialised to zero.

    Attributes:
      groups: maximum number of groups of the normalisation.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        C = x.shape[-1]
        A, B = Normalisation(self.groups, name="norm")(x)
        qkv = Pointwise(3 * C, name="qkv")((A * x + B).astype(x.dtype))
        q, k, v = jnp.split(qkv.astype(x.dtype).reshape(len(x), -1, 3 * C), 3, axis=2)
        weights = nn.softmax(product("bqc,bkc->bqk", q, k, qkv.dtype) / C**0.5)
        h = product("bqk,bkc->bqc", weights.astype(x.dtype), v, qkv.dtype).astype(x.dtype)
        h = Pointwise(C, zeros, name="out")(h.reshape(x.shape))
        return materialise_gradient((x + h).astype(x.dtype))


class UNet(nn.Module):
    """U(x, level) for examples x [B, ..., C], an array of the same shape.

    Examples are images [H, W, C], signals [L, C] or volumes [D, H, W, C].

    The way down has N blocks per resolution, and one that halves the resolution. The way up has
    N + 1 blocks per resolution, each of which also reads the result of a block of the way down
    (or of the first convolution), and one that doubles the resolution. The last convolution is
    initialised to zero. dtypes are those of `resnet.ResNet`: the result has the parameters'.

    Attributes:
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch.
      N: number of blocks per resolution on the way down.
      attention: lengths of the first spatial axis, in pixels, at which `Attention` follows each
        block; it is then also used in the middle.
      dropout: probability with which a block sets an activation to zero, if there are keys.
      groups: maximum number of groups of a normalisation.
      patch: side of the squares (or intervals, or cubes) of pixels that the first resolution
        treats as one pixel with more channels (Luhman and Luhman 2022).
      outputs: number O of arrays of x's shape in U; if it is 1, U has no axis for them.
      classes: number of classes; 0 if there are no labels. A dense layer of the one-hot label
        is added to the time embedding.
    """

    ch: int
    mult: tuple[int, ...]
    N: int
    attention: tuple[int, ...] = ()
    dropout: float = 0.0
    groups: int = 8
    patch: int = 1
    outputs: int = 1
    classes: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *S C"],
        level: Float[Array, "B"],
        keys: Key[Array, "B"] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B *S C"] | Float[Array, "B O *S C"]:
        """Evaluates the network.

        Args:
          x: images, signals or volumes.
          level: noise level, in 0..1000 (`NoiseSchedule.conditioning`).
          keys: random keys for dropout; None evaluates the network without it.
          label: class of each example, in 1..classes, or 0 for no label; None is 0 for all.
        """
        require_classes(self, label)
        shape, x = x.shape, to_patches(x, self.patch)
        dense = functools.partial(nn.Dense, 4 * self.ch, kernel_init=fan_avg)
        temb = dense(name="temb_0")(time_embedding(level, self.ch))
        temb = dense(name="temb_1")(nn.silu(temb))
        if self.classes:
            temb += dense(name="y_map")(one_hot(label, self.classes, temb))
        count = itertools.count()

        def block(h, m, name, resample=None):
            block_keys = None if keys is None else noise.fold(keys, next(count))
            module = Block(m * self.ch, self.groups, self.dropout, resample, name=name)
            return module(h, temb, block_keys)

        def block_and_attention(h, m, name):
            h = block(h, m, name)
            if h.shape[1] in self.attention:
                h = Attention(self.groups, name=f"{name}_attention")(h)
            return h

        h = materialise_gradient(Conv(self.ch, name="conv_in")(x).astype(x.dtype))
        skips = [h]
        for resolution, m in enumerate(self.mult):
            if resolution:
                last = self.mult[resolution - 1]
                h = block(h, last, f"down_{resolution - 1}_pool", mean_pool)
                skips.append(h)
            for i in range(self.N):
                h = block_and_attention(h, m, f"down_{resolution}_block_{i}")
                skips.append(h)

        h = block(h, self.mult[-1], "middle_0")
        if self.attention:
            h = Attention(self.groups, name="middle_attention")(h)
        h = block(h, self.mult[-1], "middle_1")

        for resolution, m in reversed(list(enumerate(self.mult))):
            for i in range(self.N + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block_and_attention(h, m, f"up_{resolution}_block_{i}")
            if resolution:
                h = block(h, m, f"up_{resolution}_double", double)

        A, B = Normalisation(self.groups, name="norm_out")(h)
        h = nn.silu(A * h + B).astype(x.dtype)
        h = Conv(self.outputs * x.shape[-1], zeros, name="conv_out")(h)
        parts = jnp.split(h, self.outputs, axis=-1)
        u = jnp.stack([from_patches(part, self.patch) for part in parts], axis=1)
        return u.reshape(shape) if self.outputs == 1 else u


def to_patches(x: Float[Array, "B *S C"], size: int) -> Float[Array, "B *S2 C2"]:
    """Returns an image whose pixels are the squares of `size` x `size` pixels of x.

    Of a signal, they are its intervals; of a volume, its cubes. Their values become channels:
    C2 = size² C for images.
    """
    B, *lengths, C = x.shape
    n, counts = len(lengths), [length // size for length in lengths]
    x = x.reshape(B, *itertools.chain(*((count, size) for count in counts)), C)
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(B, *counts, -1)


def from_patches(x: Float[Array, "B *S2 C2"], size: int) -> Float[Array, "B *S C"]:
    """Inverts `to_patches`."""
    B, *counts, _ = x.shape
    n = len(counts)
    x = x.reshape(B, *counts, *(size,) * n, -1)
    x = x.transpose(0, *itertools.chain(*((1 + i, 1 + n + i) for i in range(n))), 2 * n + 1)
    return x.reshape(B, *(count * size for count in counts), -1)


def double(x: Float[Array, "B *S C"]) -> Float[Array, "B *S2 C"]:
    """Doubles every spatial axis: repeats each pixel of an image in a 2x2 square."""
    B, *lengths, C = x.shape
    repeated = (B, *itertools.chain(*((length, 2) for length in lengths)), C)
    x = jnp.broadcast_to(jnp.expand_dims(x, range(2, 2 * x.ndim - 3, 2)), repeated)
    return x.reshape(B, *(2 * length for length in lengths), C)


def network(
    image_size: int,
    ch: int,
    mult: tuple[int, ...],
    N: int,
    attention: tuple[int, ...] = (),
    dropout: float = 0.0,
    groups: int = 8,
    patch: int = 1,
    outputs: int = 1,
    classes: int = 0,
) -> UNet:
    """Returns the U-Net for square images, signals or cubes.

    Args:
      image_size: length of every spatial axis [pixels].
      ch: number of channels at the first resolution.
      mult: number of channels at each resolution, in units of ch.
      N: number of blocks per resolution on the way down.
      attention: lengths at which attention is used.
      dropout: probability with which a block sets an activation to zero, if there are keys.
      groups: maximum number of groups of a normalisation.
      patch: side of the squares (or intervals, or cubes) of pixels that become one pixel at
        the first resolution.
      outputs: number of arrays of x's shape in U.
      classes: number of classes; 0 if there are no labels.

    Raises:
      UserError: if image_size is not a multiple of patch times 2^(len(mult) - 1), or attention
        names a length that no resolution has.
    """
    if image_size % patch:
        raise UserError(
            f"examples of length {image_size} cannot be divided into patches of length "
            f"{patch}; use a divisor of {image_size}"
        )
    require_divisible(image_size, mult, patch)
    sizes = [image_size // patch >> resolution for resolution in range(len(mult))]
    if not set(attention) <= set(sizes):
        raise UserError(
            f"attention at {tuple(attention)}: examples of length {image_size} have the "
            f"lengths {sizes} in this network; choose among these"
        )
    return UNet(
        ch,
        tuple(mult),
        N,
        tuple(attention),
        dropout,
        groups,
        patch=patch,
        outputs=outputs,
        classes=classes,
    )
