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
    config = config_lib.default()
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.diffusion.schedule = "cosine"
    config.energy.network = "cdrl_resnet"
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.initialiser.network = "unet"
    config.initialiser.ch = 64
    config.initialiser.mult = (1, 1, 1)
    config.initialiser.N = 3
    config.initialiser.attention = (16, 8)
    config.initialiser.dropout = 0.1
    config.mcmc.start = "initialiser"
    config.mcmc.K = 15
    config.mcmc.b_squared = 4e-4
    config.mcmc.denoise = "tweedie"
    config.optim.adam = "optax"
    config.optim.warmup_steps = 10_000
    config.optim.clip_norm = 1.0
    config.optim.ema_decay = 0.9999
    config.train.pairs = "shared"
    config.train.batch_size = 256
    config.train.num_steps = 400_000
    return config
