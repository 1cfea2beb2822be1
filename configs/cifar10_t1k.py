"""CIFAR-10, 32x32, T1k: the paper's model for densities and long chains (3.18 bits/dim).

1000 noise levels, each recovered by one draw of the normal approximation; the paper trains so,
by recovery likelihood. `--config.train.objective=denoising` needs no draw at all. The authors
never released their T1k program: what the paper leaves open is as for T6. Hardware: not yet
measured. A training step takes 8 forward passes where T6's with K = 30 takes 66, a sample 1000
gradients where T6's takes 180.

    python -m drl_jax.main --config=configs/cifar10_t1k.py --workdir=DIR
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
