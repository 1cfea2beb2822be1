"""CIFAR-10, 32x32, 1000 noise levels (T1k): the paper's model for densities and long chains.

Reproduces: Gao et al. (2021), 3.18 bits per dimension, with another loss.
Hardware:   a TPU v3-8 or 8 GPUs, or better; not yet run.
Time:       not yet measured.
Steps:      200,000, our choice, as for T6. The paper states no number, and the authors did not
            release their T1k program.
Command:

    python -m drl_jax.main --config=configs/cifar10_t1k.py --workdir=DIR

The paper's choices: 1000 levels; one draw from the normal approximation (section 3.3) recovers
a level; and the objective is the recovery likelihood. Our choices:

- Training minimises the denoising loss, from which every level learns the same log-density. It
  needs no negative samples.
- The draw that recovers a level uses the energy of the level above (`start_from_posterior` in
  `sampling/ladder.py`).
- The parameterisation of F divides f by the noise of each level.
- Settings that the paper does not state, such as the optimiser's, are those of T6.

A training step costs 6 forward passes, compared with 66 for T6 with K = 30; a sample costs 1000
gradients, compared with 180.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.diffusion.T = 1000
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.energy.parameterisation = "noise"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.beta1 = 0.9
    config.train.objective = "denoising"
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config
