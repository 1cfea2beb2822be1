"""Handwritten digits, 8x8 grey, 30 noise levels: a model with an accepted density.

Command:

    python -m drl_jax.main --config=configs/digits_density.py --workdir=DIR
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.data.test_fraction = 0.2
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.data.dequantise = 0.0
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 30
    config.diffusion.min_noise = 0.1
    config.energy.network = "image_mlp"
    config.energy.ch = 256
    config.energy.N = 4
    config.energy.dropout = 0.4
    config.energy.parameterisation = "gaussians"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = 3000
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.levels = "log_snr"
    config.train.batch_size = 128
    config.train.num_steps = 3000
    config.log.every_steps = 500
    config.log.sample_every_steps = 3000
    config.checkpoint.every_steps = 3000
    config.checkpoint.keep_every_steps = 3000
    config.likelihood.chains = 64
    return config
