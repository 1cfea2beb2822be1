"""MNIST-1D (Greydanus 2020): signals of length 40 that look like digits, with labels.

Reproduces: nothing in the paper. C2ST accuracy 0.487 (two halves of the test data: 0.520).
Hardware:   1 core of an AMD EPYC server, beside other work.
Time:       15 min (28 November 2026).
Steps:      3,000, our choice.
Command:

    python -m drl_jax.main --config=configs/mnist1d.py --workdir=DIR

The package mnist1d (`pip install -e '.[mnist1d]'`) synthesises the data.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "mnist1d"
    config.data.axes = 1
    config.data.image_size = 40
    config.data.channels = 1
    config.data.classes = 10
    config.data.flip = False
    config.data.standardise = True
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 100
    config.energy.network = "unet"
    config.energy.ch = 16
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.energy.dropout = 0.05
    config.energy.parameterisation = "noise"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.batch_size = 128
    config.train.num_steps = 3000
    config.log.every_steps = 500
    config.log.sample_every_steps = 3000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 3000
    return config
