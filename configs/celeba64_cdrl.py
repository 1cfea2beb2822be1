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
    config = config_lib.default()
    config.data.name = "celeb_a"
    config.data.image_size = 64
    config.diffusion.schedule = "cosine"
    config.energy.network = "cdrl_resnet"
    config.energy.mult = (1, 2, 2, 2, 4)
    config.energy.N = 6
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.initialiser.network = "unet"
    config.initialiser.ch = 64
    config.initialiser.mult = (1, 1, 1, 1)
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
    config.train.batch_size = 128
    config.train.num_steps = 200_000
    return config
