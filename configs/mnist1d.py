from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "mnist1d"
    config.data.axes = 1
    config.data.image_size = 40
    config.data.channels = 1
    config.data.classes = 10
    config.data.flip = False
    config.data.standardise = True
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 100
    config.energy.network = "unet"
    config.energy.ch = 32
    config.energy.mult = (1, 2)
    config.energy.N = 1
    config.energy.dropout = 0.05
    config.energy.parameterisation = "noise"
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.batch_size = 128
    config.train.num_steps = 3000
    config.log.every_steps = 500
    config.log.sample_every_steps = 3000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 3000
    return config
