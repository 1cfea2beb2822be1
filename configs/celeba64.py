"""CelebA, 64x64, six noise levels (T6).

Reproduces: Gao et al. (2021), FID 5.98.
Hardware:   a TPU v3-8 or 8 GPUs, or better; not yet run.
Time:       not yet measured.
Steps:      200,000, our choice. The paper and the authors' README state no number; their
            program stops after 1,000,000 (n_iters in its config.py), whatever the data.
Command:

    python -m drl_jax.main --config=configs/celeba64.py --workdir=DIR

The centre crop of the 218x178 images drops 20 rows at the top and 20 at the bottom, as in the
paper.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "celeb_a"
    config.data.image_size = 64
    config.energy.mult = (1, 2, 2, 2, 4)
    config.energy.N = 6
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.optim.beta1 = 0.5
    config.train.batch_size = 128
    config.train.num_steps = 200_000
    return config
