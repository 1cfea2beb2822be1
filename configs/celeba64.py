"""CelebA, 64x64, T6 (reported: FID 5.98).

The centre square crop of its 218x178 images drops 20 rows at top and bottom, as the paper does.
Hardware: a TPU v3-8 or better, or 8 GPUs; not yet measured. `num_steps` is ours.

    python -m drl_jax.main --config=configs/celeba64.py --workdir=DIR
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "celeb_a"
    config.data.image_size = 64
    config.energy.mult = (1, 2, 2, 2, 4)
    config.energy.N = 6
    config.optim.beta1 = 0.5
    config.train.batch_size = 128
    config.train.num_steps = 200_000
    return config
