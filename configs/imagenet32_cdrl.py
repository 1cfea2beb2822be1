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
    config = config_lib.cdrl()
    config.data.name = "imagenet_resized/32x32"
    config.data.classes = 1000
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.initialiser.N = 2
    config.train.num_steps = 400_000
    return config
