"""SVHN (cropped photos of house numbers), 32x32, six noise levels (T6).

Reproduces: nothing; the paper has no figure for SVHN.
Hardware:   a TPU v3-8 or 8 GPUs, or better; not yet run.
Time:       not yet measured.
Steps:      200,000, our choice, as for CIFAR-10. The authors' program can train on SVHN, and
            stops after 1,000,000 (n_iters in its config.py).
Command:

    python -m drl_jax.main --config=configs/svhn.py --workdir=DIR

The settings are those of CIFAR-10 without horizontal flips, since a mirrored digit is not a
digit.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "svhn_cropped"
    config.data.image_size = 32
    config.data.flip = False
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.optim.beta1 = 0.9
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config
