"""Handwritten digits of MNIST, 28x28 grey, six noise levels, with an initialiser: CDRL.

Reproduces: the method of Zhu et al. (2024) at a small scale, on 4,000 images; not yet run.
Hardware:   CPU cores are enough; not yet run.
Time:       not yet measured.
Steps:      10,000, our choice.
Command:

    python -m drl_jax.main --config=configs/mnist_cdrl.py --workdir=DIR

The energy and the initialiser are small versions of those of `cifar10_cdrl.py`. Both halve the
images once.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.cdrl()
    config.data.name = "mnist5k"
    config.data.test_fraction = 0.2
    config.data.image_size = 28
    config.data.channels = 1
    config.data.flip = False
    config.energy.ch = 32
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.initialiser.attention = ()
    config.initialiser.dropout = 0.0
    config.initialiser.ch = 32
    config.initialiser.mult = (1, 1)
    config.initialiser.N = 1
    config.initialiser.learning_rate = 1e-4
    config.initialiser.warmup_steps = 200
    config.initialiser.first_step = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.num_steps = 10_000
    config.log.sample_every_steps = 2000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 10_000
    return config
