"""CIFAR-10, 32x32, six noise levels, with an initialiser: CDRL.

Reproduces: Zhu et al. (2024), FID 4.31.
Hardware:   not yet run with this program.
Time:       not yet measured with this program.
Steps:      400,000, our choice: that of the authors' best checkpoint.
Command:

    python -m drl_jax.main --config=configs/cifar10_cdrl.py --workdir=DIR

A second network, the initialiser, proposes where chains start, and half of
DRL's steps suffice (15 per level).
`--mode=import_cdrl` reads the authors' weights.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.cdrl()
    config.data.name = "cifar10"
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.train.num_steps = 400_000
    return config
