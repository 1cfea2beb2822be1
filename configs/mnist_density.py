"""Handwritten digits of MNIST, 28x28 grey, 30 noise levels: a density with accepted bounds.

Reproduces: nothing in the paper. RESULT
Hardware:   1 core of an AMD EPYC server.
Time:       training 1 min 19 s, likelihood TIME (27 November 2026).
Steps:      2,000, our choice.
Command:

    python -m drl_jax.main --config=configs/mnist_density.py --workdir=DIR
    python -m drl_jax.main --mode=likelihood --workdir=DIR

As in `digits_density.py`, a density is fitted to the images before training: here a single
Gaussian, corrected so that pixels stay in their range. Level 0 has much noise, which makes it
smooth enough for annealing.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "mnist5k"
    config.data.test_fraction = 0.2
    config.data.image_size = 28
    config.data.channels = 1
    config.data.flip = False
    config.data.dequantise = 0.0
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 30
    config.diffusion.min_noise = 0.25
    config.energy.network = "image_mlp"
    config.energy.ch = 256
    config.energy.N = 2
    config.energy.dropout = 0.1
    config.energy.parameterisation = "bounded_gaussians"
    config.energy.components = 1
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.levels = "log_snr"
    config.train.batch_size = 128
    config.train.num_steps = 2000
    config.log.every_steps = 500
    config.log.sample_every_steps = 2000
    config.checkpoint.every_steps = 2000
    config.checkpoint.keep_every_steps = 2000
    config.likelihood.chains = 64
    config.likelihood.distributions = 1800
    config.likelihood.transitions = 4
    config.likelihood.burn_in = 3000
    return config
