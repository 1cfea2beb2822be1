"""LSUN churches, 64x64, T6 (the paper shows samples, no score).

Centre square crop, antialiased resize. Hardware: a TPU v3-8 or better, or 8 GPUs; not yet
measured. `num_steps` is ours.

    python -m drl_jax.main --config=configs/lsun_church64.py --workdir=DIR
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "lsun/church_outdoor"
    config.data.image_size = 64
    config.energy.mult = (1, 2, 2, 2, 4)
    config.energy.N = 2
    config.optim.beta1 = 0.9
    config.train.batch_size = 128
    config.train.num_steps = 200_000
    return config
