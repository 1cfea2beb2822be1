"""Analytical FLOP counts of the programs that a configuration defines.

Costs are expressed in forward passes of the network. A gradient with respect to the images
costs one pass more than f alone; a gradient with respect to images and parameters costs two
more. A multiplication and an addition count as two FLOPs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from drl_jax.config import example_shape
from drl_jax.networks.image_mlp import EMBEDDING


def forward(config: ConfigDict) -> float:
    """Returns the FLOPs of f for one example: its convolutions, dense layers and attention."""
    energy, data = config.energy, config.data
    outputs = 2 if energy.form == "mixture" else 1
    if energy.network == "mlp":
        return mlp(data.channels, energy.ch, energy.N)
    if energy.network == "image_mlp":
        return image_mlp(math.prod(example_shape(config)), energy.ch, energy.N, outputs)
    own = energy.ch, energy.mult, energy.N
    if energy.network == "unet":
        size = data.image_size // energy.patch
        channels = data.channels * energy.patch**data.axes
        return unet(size, channels, *own, energy.attention, outputs, axes=data.axes)
    return resnet(data.image_size, data.channels, *own, axes=data.axes)


def initialiser(config: ConfigDict) -> float:
    """Returns the FLOPs of one prediction of the initialiser; 0 without one."""
    own, data = config.initialiser, config.data
    if own.network == "none":
        return 0.0
    if own.network == "unet":
        size, channels = data.image_size, data.channels
        return unet(size, channels, own.ch, own.mult, own.N, own.attention, axes=data.axes)
    return image_mlp(math.prod(example_shape(config)), own.ch, own.N)


def mlp(dimension: int, width: int, depth: int) -> float:
    """Returns the FLOPs of `networks.mlp` for one vector."""
    # `embedding` is the two layers of the time embedding; `ends` is the layers of the Fourier
    # features, of the input and of the head. Each residual layer has two dense layers.
    embedding, ends = 2 * width**2, dimension * width + (width + dimension) * width + width**2
    return 2.0 * (embedding + ends + depth * 2 * width**2)


def image_mlp(dimension: int, width: int, depth: int, outputs: int = 1) -> float:
    """Returns the FLOPs of `networks.image_mlp` for one example of `dimension` values."""
    E = 2 * EMBEDDING  # width of the level's embedding
    embedding, ends = EMBEDDING * E + E * E, (1 + outputs) * dimension * width
    return 2.0 * (embedding + ends + depth * (2 * width**2 + 2 * E * width))


def resnet(
    image_size: int, channels: int, ch: int, mult: Sequence[int], N: int, axes: int = 2
) -> float:
    """Returns the FLOPs of `networks.resnet` for one example; those of labels are not counted.

    Products with the zero padding at the border are included, because a convolution computed as
    matrix products performs them too.
    """

    def conv(size: int, inputs: int, outputs: int) -> int:
        return 2 * (3 * size) ** axes * inputs * outputs

    E = 4 * ch  # width of the time embedding
    total = 2 * ch * E + 2 * E * E + conv(image_size, channels, ch)
    width = ch
    for level, m in enumerate(mult):
        size = image_size >> level
        for _ in range(N):
            total += conv(size, width, m * ch) + 2 * E * m * ch + conv(size, m * ch, m * ch)
            if width != m * ch:
                total += conv(size, width, m * ch)
            width = m * ch
    return float(total + 2 * E * width)


def unet(
    image_size: int,
    channels: int,
    ch: int,
    mult: Sequence[int],
    N: int,
    attention: Sequence[int] = (),
    outputs: int = 1,
    axes: int = 2,
) -> float:
    """Returns the FLOPs of `networks.unet` for one example, without patches.

    Like `resnet`, it includes products with the padding. Halving or doubling the resolution and
    the normalisations are not counted.
    """
    E = 4 * ch  # width of the time embedding

    def conv(size: int, inputs: int, outputs: int, taps: int = 3) -> int:
        return 2 * (taps * size) ** axes * inputs * outputs

    def block(size: int, inputs: int, outputs: int) -> int:
        skip = conv(size, inputs, outputs, taps=1) if inputs != outputs else 0
        return (
            conv(size, inputs, outputs) + conv(size, outputs, outputs) + skip + 4 * E * outputs
        )

    def attend(size: int, width: int) -> int:
        pairs = size ** (2 * axes)  # of pixels
        return conv(size, width, 4 * width, taps=1) + 2 * 2 * pairs * width

    def block_and_attention(size: int, inputs: int, outputs: int) -> int:
        return block(size, inputs, outputs) + (size in attention) * attend(size, outputs)

    total = 2 * ch * E + 2 * E * E + conv(image_size, channels, ch)
    width, skips = ch, [ch]
    for resolution, m in enumerate(mult):
        if resolution:
            total += block(image_size >> resolution, width, width)
            skips.append(width)
        for _ in range(N):
            total += block_and_attention(image_size >> resolution, width, m * ch)
            width = m * ch
            skips.append(width)
    size = image_size >> (len(mult) - 1)
    total += 2 * block(size, width, width) + bool(attention) * attend(size, width)
    for resolution, m in reversed(list(enumerate(mult))):
        size = image_size >> resolution
        for _ in range(N + 1):
            total += block_and_attention(size, width + skips.pop(), m * ch)
            width = m * ch
        if resolution:
            total += block(2 * size, width, width)
    return float(total + conv(image_size, width, outputs * channels))


def training_step(config: ConfigDict) -> float:
    """Returns the FLOPs of one training step per example of its batch.

    The recovery loss and its gradient cost 3 passes for the positive and 3 for the negative
    sample, in addition to the chain. The denoising loss contains a gradient with respect to the
    images (2 passes); differentiating it takes 4 more. The initialiser's prediction and the
    gradient of its loss cost 3 passes of that network.
    """
    if config.train.objective == "denoising":
        return 6 * forward(config)
    gradients = np.max(_gradients(config))  # the longest chain in a batch determines its cost
    return (2 * gradients + 6) * forward(config) + 3 * initialiser(config)


def sampling(config: ConfigDict) -> float:
    """Returns the FLOPs of generating one sample from white noise, through all levels."""
    gradients, proposals = evaluations(config)
    return 2 * gradients * forward(config) + proposals * initialiser(config)


class Evaluations(NamedTuple):
    """How often the networks are evaluated to generate one sample, through all levels.

    Attributes:
      gradients: gradients of f with respect to the image: those of the chains, of starting
        points from `posterior`, and of the final denoising.
      proposals: predictions of the initialiser.
    """

    gradients: int
    proposals: int


def evaluations(config: ConfigDict) -> Evaluations:
    """Returns how often the networks are evaluated to generate one sample."""
    mcmc = config.mcmc
    gradients = int(np.sum(_gradients(config))) + (mcmc.denoise != "no")
    return Evaluations(gradients, levels(config) * (mcmc.start == "initialiser"))


def levels(config: ConfigDict) -> int:
    """Returns the number of noise levels that samples pass through."""
    return config.mcmc.levels or config.diffusion.T


def leapfrog(config: ConfigDict) -> int:
    """Returns the number of leapfrog steps in the longest trajectory of one chain step."""
    return max(config.mcmc.leapfrog) if config.mcmc.sampler == "hmc" else 1


def _gradients(config: ConfigDict) -> np.ndarray:
    """Returns the number of gradients that a chain evaluates at each level [T]."""
    mcmc = config.mcmc
    steps = np.asarray(mcmc.leapfrog) if mcmc.sampler == "hmc" else np.ones(1)
    gradients = mcmc.K * np.broadcast_to(steps, levels(config))
    if mcmc.sampler != "langevin" and mcmc.K:
        gradients = gradients + 1  # to initialise the chain
    # The program computes the starting point at every level, although it is not used at T - 1.
    return gradients + (mcmc.start == "posterior")
