"""LSUN bedrooms, 128x128, T6 (the paper shows samples, no score).

Centre square crop, antialiased resize. Hardware: a TPU v3-8 or better, or 8 GPUs; not yet
measured. `num_steps` is ours.

    python -m drl_jax.main --config=configs/lsun_bedroom128.py --workdir=DIR
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "lsun/bedroom"
    config.data.image_size = 128
    config.energy.mult = (1, 2, 2, 2, 4, 4)
    config.energy.N = 5
    config.optim.beta1 = 0.5
    config.train.batch_size = 64
    config.train.num_steps = 200_000
    return config
