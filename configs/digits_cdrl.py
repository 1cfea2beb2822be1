"""Handwritten digits, 8x8 grey, six noise levels, with an initialiser: CDRL.

Reproduces: the method of Zhu et al. (2024) at a small scale. The Fréchet distance from the
            training images, in the features of a classifier, is 4.758 for 359 samples and 1.178
            for 359 test images; 63.2% of the samples have a confident class. The pixel Fréchet
            distance is 0.630.
Hardware:   one core of an AMD EPYC server, which other programs used, too.
Time:       5 min (28 November 2026).
Steps:      5,000, our choice.
Command:

    python -m drl_jax.main --config=configs/digits_cdrl.py --workdir=DIR

`digits_t6.py` with cosine levels, CDRL's energy, half as many steps per level, and an
initialiser that proposes where they start. With a learning rate of 1e-3, training diverged at
step 3,639.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.cdrl()
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.energy.ch = 32
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.initialiser.attention = ()
    config.initialiser.dropout = 0.0
    config.initialiser.network = "mlp"
    config.initialiser.ch = 256
    config.initialiser.N = 2
    config.initialiser.learning_rate = 1e-3
    config.initialiser.warmup_steps = 200
    config.initialiser.first_step = 0
    config.mcmc.K = 8
    config.mcmc.b_squared = 8e-4
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.num_steps = 5000
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 5000
    return config
