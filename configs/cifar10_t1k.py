"""CIFAR-10, 32x32, 1000 noise levels (T1k): the paper's model for densities and long chains.

Reproduces: Gao et al. (2021), 3.18 bits per dimension.
Hardware:   a TPU v3-8 or 8 GPUs, or better; not yet run.
Time:       not yet measured.
Command:

    python -m drl_jax.main --config=configs/cifar10_t1k.py --workdir=DIR

Each level is recovered by one draw from the normal approximation, and training maximises the
recovery likelihood, as in the paper. `--config.train.objective=denoising` trains without any
draw. The authors did not release their T1k program; settings that the paper does not state
are those of T6. A training step costs 8 forward passes, compared with 66 for T6 with K = 30;
a sample costs 1000 gradients, compared with 180.
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
    config.mcmc.sampler = "normal_approximation"
    config.mcmc.K = 1
    config.optim.beta1 = 0.9
    config.train.objective = "recovery"
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config
