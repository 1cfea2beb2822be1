"""CIFAR-10, 32x32, six noise levels (T6).

Reproduces: Gao et al. (2021), FID 9.58 and inception score 8.30.
Hardware:   8 TPU v3 cores in the paper; not yet run with this program.
Time:       more than 40 hours in the paper; not yet measured with this program.
Command:

    python -m drl_jax.main --config=configs/cifar10.py --workdir=DIR

The paper does not state the number of steps; `num_steps` about fits its training time.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.optim.beta1 = 0.9
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config
