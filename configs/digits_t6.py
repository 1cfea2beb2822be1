"""Handwritten digits, 8x8 grey, six noise levels (T6).

Reproduces: the paper's method at a small scale; pixel Fréchet distance 0.477 between samples
            and data. Two random halves of the data are 0.255 apart.
Hardware:   2 cores of an AMD EPYC server.
Time:       6 min 20 s and 7 min 37 s, including installation: two runs (26 November 2026).
Steps:      5,000, our choice.
Command:

    python -m drl_jax.main --config=configs/digits_t6.py --workdir=DIR

The network is small. Chains have half the paper's steps and twice its b², which gives equally
good samples at half the cost.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.energy.ch = 32
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.mcmc.K = 15
    config.mcmc.b_squared = 4e-4
    config.optim.learning_rate = 1e-3
    config.optim.adam = "optax"
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.num_steps = 5000
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 5000
    return config
