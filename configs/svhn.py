"""SVHN (cropped street-view digits), 32x32, T6: not in the paper's tables.

The settings are CIFAR-10's, without its horizontal flips: a mirrored digit is no digit.
Hardware: as for CIFAR-10; not yet measured. `num_steps` is ours.

    python -m drl_jax.main --config=configs/svhn.py --workdir=DIR
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "svhn_cropped"
    config.data.image_size = 32
    config.data.flip = False
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.optim.beta1 = 0.9
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config
