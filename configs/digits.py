"""Handwritten digits, 8x8 grey, from scratch on a laptop."""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.energy.ch = 16
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.num_steps = 1000
    config.log.sample_every_steps = 500
    config.checkpoint.every_steps = 200
    return config
