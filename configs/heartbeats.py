"""Synthetic electrocardiograms of one beat (McSharry et al. 2003): signals of length 64.

Reproduces: nothing in the paper. C2ST accuracy 0.528 (two halves of the test data: 0.495).
Hardware:   1 core of an AMD EPYC server.
Time:       2 min (28 November 2026).
Steps:      5,000, our choice.
Command:

    python -m drl_jax.main --config=configs/heartbeats.py --workdir=DIR

`python -m drl_jax.main --mode=ood --workdir=DIR --against=premature_beats,patch` then finds
premature beats.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "heartbeats"
    config.data.axes = 1
    config.data.image_size = 64
    config.data.channels = 1
    config.data.flip = False
    config.data.standardise = True
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 100
    config.energy.network = "image_mlp"
    config.energy.ch = 256
    config.energy.mult = (1,)
    config.energy.N = 4
    config.energy.dropout = 0.1
    config.energy.parameterisation = "noise"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.batch_size = 128
    config.train.num_steps = 5000
    config.log.every_steps = 500
    config.log.sample_every_steps = 5000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 5000
    return config
