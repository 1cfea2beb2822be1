"""The breast cancer table of scikit-learn: vectors of 30 features, and their density.

Reproduces: nothing in the paper. Held-out log-density 26.61 to 26.68 nats.
Hardware:   1 core of an AMD EPYC server.
Time:       1 min, and 3 min of CPU time for the density (28 November 2026).
Steps:      300, our choice.
Command:

    python -m drl_jax.main --config=configs/breast_cancer.py --workdir=DIR
    python -m drl_jax.main --mode=likelihood --workdir=DIR

The reference of the energy is a mixture of two Gaussians, fitted to the table.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "breast_cancer"
    config.data.channels = 30
    config.data.test_fraction = 0.2
    config.data.flip = False
    config.data.standardise = True
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 30
    config.diffusion.min_noise = 0.1
    config.energy.network = "mlp"
    config.energy.ch = 64
    config.energy.N = 2
    config.energy.dropout = 0.5
    config.energy.parameterisation = "gaussians"
    config.energy.components = 2
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 20
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.objective = "denoising"
    config.train.levels = "log_snr"
    config.train.batch_size = 1024
    config.train.num_steps = 300
    config.log.every_steps = 100
    config.log.sample_every_steps = 300
    config.checkpoint.every_steps = 300
    config.checkpoint.keep_every_steps = 300
    config.evaluation.num_samples = 1000
    config.likelihood.leapfrog = 8
    config.likelihood.burn_in = 400
    return config
