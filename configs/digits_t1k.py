"""Handwritten digits, 8x8 grey, 1000 noise levels (T1k).

Reproduces: the paper's T1k at a small scale; pixel Fréchet distance 1.155 between samples and
            data.
Hardware:   2 cores of an AMD EPYC server.
Time:       4 min (26 November 2026).
Steps:      10,000, our choice.
Command:

    python -m drl_jax.main --config=configs/digits_t1k.py --workdir=DIR

Training minimises the denoising loss, and a sample is one draw per level
(`start_from_posterior` in `sampling/ladder.py`). Neither needs a chain.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.diffusion.T = 1000
    config.energy.ch = 32
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.energy.parameterisation = "noise"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.adam = "optax"
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.objective = "denoising"
    config.train.batch_size = 64
    config.train.num_steps = 10_000
    config.log.sample_every_steps = 5000
    config.checkpoint.every_steps = 2000
    config.checkpoint.keep_every_steps = 10_000
    return config
