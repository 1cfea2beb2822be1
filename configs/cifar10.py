"""CIFAR-10, 32x32, six noise levels (T6).

Reproduces: Gao et al. (2021), FID 9.58 and inception score 8.30.
Hardware:   8 TPU v3 cores in the paper; not yet run with this program.
Time:       more than 40 hours in the paper; not yet measured with this program.
Steps:      200,000, our choice. The paper states the time and no number, and neither does the
            authors' README; their program stops after 1,000,000 (n_iters in its config.py).
Command:

    python -m drl_jax.main --config=configs/cifar10.py --workdir=DIR
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.energy.dtype = "bfloat16"  # our choice; see drl_jax/tools/README.md
    config.optim.beta1 = 0.9
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config
