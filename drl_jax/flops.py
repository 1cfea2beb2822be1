"""FLOPs of a configuration's programs, counted on paper.

In units of forward passes of the network: a gradient with respect to the images costs one more,
one with respect to images and parameters two more. A multiplication and an addition are two.
"""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict


def forward(config: ConfigDict) -> float:
    """Returns the FLOPs of f for one example: its convolutions and dense layers."""
    energy, data = config.energy, config.data
    if energy.network == "mlp":
        return mlp(data.channels, energy.ch, energy.N)
    return resnet(data.image_size, data.channels, energy.ch, energy.mult, energy.N)


def mlp(dimension: int, width: int, depth: int) -> float:
    """Returns the FLOPs of `energies.mlp` on one vector."""
    # Two layers of the time embedding; then the waves, the input, the head; then, of each
    # residual layer, itself and what it makes of the time.
    embedding, ends = 2 * width**2, dimension * width + (width + dimension) * width + width**2
    return 2.0 * (embedding + ends + depth * 2 * width**2)


def resnet(image_size: int, channels: int, ch: int, mult: Sequence[int], N: int) -> float:
    """Returns the FLOPs of `energies.resnet` on one image.

    Taps on the zero border count, as they do in the matrix products that convolutions are
    made of.
    """

    def conv(size: int, inputs: int, outputs: int) -> int:
        return 2 * 9 * size**2 * inputs * outputs

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


def training_step(config: ConfigDict) -> float:
    """Returns the FLOPs of one training step for each example of its batch.

    The loss takes a pair of examples and the gradient of it 3 passes each. The denoising loss
    has in it a gradient with respect to images, 2 passes; the gradient of that takes 4 more.
    """
    if config.train.objective == "denoising":
        return 6 * forward(config)
    gradients = np.max(_gradients(config))  # the longest chain of a batch sets its cost
    return (2 * gradients + 6) * forward(config)


def sampling(config: ConfigDict) -> float:
    """Returns the FLOPs of one sample, through all levels."""
    return 2 * np.sum(_gradients(config)) * forward(config)


def leapfrog(config: ConfigDict) -> int:
    """Returns the longest trajectory of a chain's step, in leapfrog steps."""
    return max(config.mcmc.leapfrog) if config.mcmc.sampler == "hmc" else 1


def _gradients(config: ConfigDict) -> np.ndarray:
    """Returns how many gradients a chain takes, a number a level."""
    mcmc, T = config.mcmc, config.diffusion.T
    if mcmc.sampler in ("langevin", "normal_approximation"):
        return np.full(T, mcmc.K)
    steps = np.asarray(mcmc.leapfrog) if mcmc.sampler == "hmc" else np.ones(1)
    return 1 + mcmc.K * np.broadcast_to(steps, T)  # and one at the start
