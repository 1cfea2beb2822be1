"""FLOPs of a configuration's programs, counted on paper.

In units of forward passes of the network: a gradient with respect to the images costs one more,
one with respect to images and parameters two more.
"""

import numpy as np
from ml_collections import ConfigDict

from drl_jax import benchmark


def forward(config: ConfigDict) -> float:
    """Returns the FLOPs of f for one example: its convolutions and dense layers."""
    energy, channels = config.energy, config.data.channels
    if energy.network == "mlp":
        # Two layers of the time embedding; then the waves, the input, the head; then, of each
        # residual layer, itself and what it makes of the time.
        E = energy.ch
        return 2.0 * (
            2 * E * E + channels * E + (E + channels) * E + E * E + 2 * energy.N * E * E
        )
    return benchmark.forward_flops(
        config.data.image_size, channels, energy.ch, energy.mult, energy.N
    )


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
