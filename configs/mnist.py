"""Handwritten digits of MNIST, 28x28 grey, 100 noise levels.

Reproduces: nothing in the paper. The Fréchet distance from the training images, in the features
            of a classifier, is 0.602 for 1,000 samples, a tenth of each class, and 0.462 for
            1,000 test images. 89.4% of the samples (with `--guidance=0.3` 94.6%) and 95.9% of
            the test images have a class with a probability above 0.9. The median distance to
            the nearest training image is 1.11 times that of test images.
Hardware:   1 core of an AMD EPYC server.
Time:       49 min, with `--config.train.accumulate=8` (27 November 2026).
Steps:      14,000, our choice. `configs/README.md` compares shorter runs and a multilayer
            perceptron, which takes 13 min.
Command:

    python -m drl_jax.main --config=configs/mnist.py --workdir=DIR

As in `digits.py`, training minimises the denoising loss, and a sample is one draw per level.
The network knows the class of each image. Four fifths of the pixels are black, so f contains
the odds that a pixel is (`recovery.mixture`).
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "mnist5k"
    config.data.test_fraction = 0.2
    config.data.image_size = 28
    config.data.channels = 1
    config.data.flip = False
    config.data.classes = 10
    config.data.dequantise = 2 / 255
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 100
    config.energy.network = "unet"
    config.energy.patch = 4
    config.energy.ch = 64
    config.energy.mult = (1,)
    config.energy.N = 1
    config.energy.form = "mixture"
    config.energy.dropout = 0.05
    config.energy.parameterisation = "uniform"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1.5e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.999
    config.train.objective = "denoising"
    config.train.batch_size = 64
    config.train.num_steps = 14_000
    config.log.every_steps = 500
    config.log.sample_every_steps = 14_000
    config.checkpoint.every_steps = 2000
    config.checkpoint.keep_every_steps = 14_000
    return config
