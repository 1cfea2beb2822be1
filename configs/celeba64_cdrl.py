"""CelebA, 64x64, six noise levels, with an initialiser: CDRL.

Reproduces: nothing published; `celeba64.py` with the method of Zhu et al. (2024).
Hardware:   not yet run.
Time:       not yet measured.
Steps:      200,000, our choice, as in `celeba64.py`.
Command:

    python -m drl_jax.main --config=configs/celeba64_cdrl.py --workdir=DIR

Everything that `cifar10_cdrl.py` sets for the method is the same here. The energy has the
resolutions and blocks of `celeba64.py`, and the initialiser has one more resolution.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.cdrl()
    config.data.name = "celeb_a"
    config.data.image_size = 64
    config.energy.mult = (1, 2, 2, 2, 4)
    config.energy.N = 6
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.initialiser.mult = (1, 1, 1, 1)
    config.train.batch_size = 128
    config.train.num_steps = 200_000
    return config
