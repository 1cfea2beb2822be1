"""CIFAR-10, 32x32, T6: the paper's main table (reported: FID 9.58, IS 8.30).

Hardware: the authors took 40+ hours on 8 TPU v3 cores; this program on an accelerator is not
yet measured. The paper gives no number of steps; `num_steps` is about what fits those hours.

    python -m drl_jax.main --config=configs/cifar10.py --workdir=DIR
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
