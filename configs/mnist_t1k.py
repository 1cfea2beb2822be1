"""Handwritten digits of MNIST, 32x32 grey, 1000 noise levels (T1k).

Reproduces: the paper's T1k at a small scale, on 4,000 images; not yet run.
Hardware:   CPU cores are enough; not yet run.
Time:       not yet measured.
Steps:      20,000, our choice.
Command:

    python -m drl_jax.main --config=configs/mnist_t1k.py --workdir=DIR

Training minimises the denoising loss, and a sample is one draw per level
(`start_from_posterior` in `sampling/ladder.py`). Neither needs a chain. The network is the
paper's, with few channels, and halves the images twice.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "mnist5k"
    config.data.test_fraction = 0.2
    config.data.image_size = 32
    config.data.channels = 1
    config.data.flip = False
    config.diffusion.T = 1000
    config.energy.ch = 32
    config.energy.mult = (1, 2, 2)
    config.energy.N = 1
    config.energy.parameterisation = "noise"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.objective = "denoising"
    config.train.batch_size = 64
    config.train.num_steps = 20_000
    config.log.sample_every_steps = 20_000
    config.checkpoint.every_steps = 2000
    config.checkpoint.keep_every_steps = 20_000
    return config
