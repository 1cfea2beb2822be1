"""The method as one value: which network, which noise levels, which chain, which loss."""

import functools
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from drl_jax import diffusion, recovery
from drl_jax.diffusion import NoiseSchedule
from drl_jax.energies import mlp, resnet
from drl_jax.energies.energy import Energy, Params, computed_in
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin, mala, normal_approximation
from drl_jax.recovery import LevelFn, Parameterisation
from drl_jax.sampling import Sampler


class Method(NamedTuple):
    """What is learned, how, and how its conditionals are sampled.

    Attributes:
      energy: the network.
      schedule: the noise levels.
      parameterisation: of F by the network.
      sampler: of the conditionals.
      objective: the loss, 'recovery' or 'denoising'.
      levels: how training draws them (`train_step.draw_levels`).
    """

    energy: Energy
    schedule: NoiseSchedule
    parameterisation: Parameterisation
    sampler: Sampler
    objective: Literal["recovery", "denoising"]
    levels: Literal["uniform", "log_noise"] = "uniform"

    def F(self, params: Params) -> LevelFn:
        """Returns the levels' log-density under these (normalised) parameters."""
        f = functools.partial(self.energy.f, params)
        return recovery.log_density(f, self.parameterisation)


def from_config(config: ConfigDict) -> Method:
    """Builds what the configuration names, with the sampler of its training.

    Raises:
      UserError: if T or the image size is impossible, or the sampler has settings for
        another number of levels.
    """
    schedule = diffusion.schedule(config.diffusion.T)
    ch, N, channels = config.energy.ch, config.energy.N, config.data.channels
    if config.energy.network == "mlp":
        energy = mlp.energy(channels, ch, N, schedule.T)
    else:
        energy = resnet.energy(config.data.image_size, channels, ch, config.energy.mult, N)
    if config.energy.dtype == "bfloat16":
        energy = computed_in(jnp.bfloat16, energy)
    if config.energy.parameterisation == "step":
        s = recovery.step_sizes(schedule, config.mcmc.b_squared)
        parameterisation = Parameterisation(s**2, precision=0.0)
    elif config.energy.parameterisation == "noise":
        uniform = schedule.a_bar[:-1] * config.data.dequantise / math.sqrt(12)
        temperature = jnp.hypot(schedule.sigma_bar[:-1], uniform)  # of all noise
        parameterisation = Parameterisation(temperature, precision=1.0)
    else:
        parameterisation = Parameterisation(jnp.ones(schedule.T), precision=1.0)
    sampler = make_sampler(config.mcmc, schedule)
    train = config.train
    return Method(energy, schedule, parameterisation, sampler, train.objective, train.levels)


def make_sampler(
    mcmc: ConfigDict, schedule: NoiseSchedule, noise_scale: float = 1.0
) -> Sampler:
    """Builds the sampler that `config.mcmc` names.

    Args:
      mcmc: this part of the configuration.
      schedule: the noise levels.
      noise_scale: of the noise, in a sampler that allows for it.

    Raises:
      UserError: if the leapfrog steps are for another number of levels.
    """
    T = schedule.T
    step_size = recovery.step_sizes(schedule, mcmc.b_squared)
    scale = jnp.full((T,), noise_scale)
    if mcmc.sampler == "langevin":
        tuning = {"step_size": step_size, "noise_scale": scale}
        return Sampler(langevin.init, langevin.kernel, tuning, mcmc.K)
    if mcmc.sampler == "normal_approximation":
        tuning = {"step_size": schedule.sigma[1:], "noise_scale": scale}
        return Sampler(normal_approximation.init, normal_approximation.kernel, tuning, mcmc.K)
    if mcmc.sampler == "mala":
        return Sampler(mala.init, mala.kernel, {"step_size": step_size}, mcmc.K)
    if len(mcmc.leapfrog) not in (1, T):
        raise UserError(
            f"config.mcmc.leapfrog is {mcmc.leapfrog}: give one number for all levels, or "
            f"one for each of the {T}"
        )
    leapfrog = jnp.broadcast_to(jnp.asarray(mcmc.leapfrog), (T,))
    return Sampler(hmc.init, hmc.kernel, {"step_size": step_size, "leapfrog": leapfrog}, mcmc.K)
