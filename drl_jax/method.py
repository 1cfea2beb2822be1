"""The method as one value: which network, which noise levels, which chain."""

from typing import NamedTuple

from jaxtyping import Array, Float
from ml_collections import ConfigDict

from drl_jax import diffusion, recovery
from drl_jax.diffusion import NoiseSchedule
from drl_jax.energies import resnet
from drl_jax.energies.energy import Energy


class Method(NamedTuple):
    """What is learned, and how its conditionals are sampled.

    Attributes:
      energy: the network.
      schedule: the noise levels.
      s: the Langevin step of every level.
      K: chain steps a level.
    """

    energy: Energy
    schedule: NoiseSchedule
    s: Float[Array, "T"]
    K: int


def from_config(config: ConfigDict) -> Method:
    """Builds what the configuration names.

    Raises:
      UserError: if T or the image size is impossible.
    """
    energy = resnet.energy(
        config.data.image_size,
        config.data.channels,
        config.energy.ch,
        config.energy.mult,
        config.energy.N,
    )
    schedule = diffusion.schedule(config.diffusion.T)
    s = recovery.step_sizes(schedule, config.mcmc.b_squared)
    return Method(energy, schedule, s, config.mcmc.K)
