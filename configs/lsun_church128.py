"""LSUN churches, 128x128, six noise levels (T6).

Reproduces: samples in Gao et al. (2021), which reports no score.
Hardware:   a TPU v3-8 or 8 GPUs, or better; not yet run.
Time:       not yet measured.
Steps:      200,000, our choice. The paper and the authors' README state no number; their
            program stops after 1,000,000 (n_iters in its config.py), whatever the data.
Command:

    python -m drl_jax.main --config=configs/lsun_church128.py --workdir=DIR

Images are cropped to their centre square and resized with antialiasing, as in the paper.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "lsun/church_outdoor"
    config.data.image_size = 128
    config.energy.mult = (1, 2, 2, 2, 4, 4)
    config.energy.N = 2
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.optim.beta1 = 0.5
    config.train.batch_size = 64
    config.train.num_steps = 200_000
    return config
