"""Points in the plane, ten noise levels, with an initialiser: CDRL.

Reproduces: the method of Zhu et al. (2024) on data with known densities;
            KL(data || model) at level 0 is 0.015 nats for blobs.
Hardware:   1 core of an AMD EPYC server.
Time:       less than 2 min (27 November 2026).
Steps:      1,000, our choice.
Command:

    python -m drl_jax.main --config=configs/toy2d_cdrl.py --workdir=DIR --config.data.name=blobs

Chains of MALA, because the densities in the plane need chains that converge: with 15 steps of
Langevin dynamics and 20 levels, KL was 2.7 nats. `configs/README.md` compares pairs with shared
and with independent noise.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.cdrl()
    config.data.name = "blobs"
    config.data.channels = 2
    config.data.flip = False
    config.diffusion.T = 10
    config.diffusion.min_noise = 0.1
    config.energy.network = "mlp"
    config.energy.ch = 64
    config.energy.N = 2
    config.energy.parameterisation = "unit"
    config.initialiser.attention = ()
    config.initialiser.dropout = 0.0
    config.initialiser.network = "mlp"
    config.initialiser.N = 2
    config.initialiser.learning_rate = 1e-3
    config.initialiser.warmup_steps = 200
    config.initialiser.first_step = 0
    config.mcmc.sampler = "mala"
    config.mcmc.denoise = "no"
    config.mcmc.K = 10
    config.mcmc.b_squared = 0.2
    config.optim.learning_rate = 5e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.batch_size = 512
    config.train.num_steps = 1000
    config.log.every_steps = 500
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 1000
    config.evaluation.num_samples = 2000
    config.evaluation.batch_size = 2000
    return config
