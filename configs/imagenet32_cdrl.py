"""ImageNet, 32x32, six noise levels, with an initialiser and labels: CDRL.

Reproduces: Zhu et al. (2024), FID 9.35, and 6.18 with guidance (0.7).
Hardware:   not yet run with this program.
Time:       not yet measured with this program.
Steps:      400,000, our choice: that of the authors' best checkpoint for CIFAR-10.
Command:

    python -m drl_jax.main --config=configs/imagenet32_cdrl.py --workdir=DIR

Samples with guidance: `--mode=sample --guidance=0.7`. The settings are those of
`cifar10_cdrl.py`, except for the labels and the smaller initialiser.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "imagenet_resized/32x32"
    config.data.image_size = 32
    config.data.classes = 1000
    config.diffusion.schedule = "cosine"
    config.energy.network = "cdrl_resnet"
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.initialiser.network = "unet"
    config.initialiser.ch = 64
    config.initialiser.mult = (1, 1, 1)
    config.initialiser.N = 2
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
