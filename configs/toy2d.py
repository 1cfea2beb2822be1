"""Points in the plane with a known density at every noise level.

Reproduces: the exact densities of toy data; KL(data || model) at level 0 is 0.022 nats for
            moons.
Hardware:   2 cores of an AMD EPYC server.
Time:       3 to 4 minutes per shape (26 November 2026).
Steps:      3,000, our choice.
Command:

    python -m drl_jax.main --config=configs/toy2d.py --workdir=DIR --config.data.name=moons

`--config.data.name` is moons, rings, checkerboard, blobs, spirals or ellipse. A run ends with
toy2d.png, which shows the learned and the exact densities side by side, and with the KL
divergences in metrics.json.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "moons"
    config.data.channels = 2
    config.data.flip = False
    config.diffusion.T = 1000
    config.energy.network = "mlp"
    config.energy.ch = 64
    config.energy.N = 2
    config.energy.parameterisation = "unit"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 5e-3
    config.optim.adam = "optax"
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.objective = "denoising"
    config.train.levels = "log_snr"
    config.train.batch_size = 1024
    config.train.num_steps = 3000
    config.log.every_steps = 500
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 3000
    config.evaluation.num_samples = 2000
    config.evaluation.batch_size = 2000
    return config
