"""Points in the plane, whose every noise level is known exactly, in minutes on a CPU.

`--config.data.name` is moons, rings, checkerboard, blobs, spirals or ellipse. A run ends with
toy2d.png, the learned densities beside the true ones, and their KL in metrics.json.

python -m drl_jax.main --config=configs/toy2d.py --workdir=DIR --config.data.name=moons
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
    config.mcmc.sampler = "normal_approximation"
    config.mcmc.K = 1
    config.optim.learning_rate = 5e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = 3000
    config.optim.ema_decay = 0.99
    config.train.objective = "denoising"
    config.train.levels = "log_noise"
    config.train.batch_size = 1024
    config.train.num_steps = 3000
    config.log.every_steps = 500
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 3000
    config.evaluation.num_samples = 2000
    config.evaluation.batch_size = 2000
    return config
