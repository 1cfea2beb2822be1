"""Handwritten digits, 8x8 grey, 100 noise levels: the demo.

Reproduces: nothing in the paper; digits that a classifier finds as good as test images. The
            Fréchet distance from the training images, in the classifier's features, is 1.179
            for 359 samples and 1.178 for 359 test images. 93.9% of the samples and 95.8% of the
            test images have a class with a probability above 0.9. The pixel Fréchet distance is
            0.220.
Hardware:   2 cores of an AMD EPYC server.
Time:       2 min 54 s, including installation: `bash launch/demo.sh` (27 November 2026).
Steps:      5,000, our choice.
Command:

    python -m drl_jax.main --config=configs/digits.py --workdir=DIR

Training minimises the denoising loss, and a sample is one draw per level. The reference density
keeps pixels in their range; dropout keeps the network from memorising the images.
"""

from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.data.test_fraction = 0.2
    config.data.image_size = 8
    config.data.channels = 1
    config.data.flip = False
    config.data.dequantise = 2 / 16
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 100
    config.energy.network = "image_mlp"
    config.energy.ch = 256
    config.energy.N = 4
    config.energy.dropout = 0.4
    config.energy.parameterisation = "uniform"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.batch_size = 128
    config.train.num_steps = 5000
    config.log.every_steps = 500
    config.log.sample_every_steps = 5000
    config.checkpoint.every_steps = 5000
    config.checkpoint.keep_every_steps = 5000
    return config
