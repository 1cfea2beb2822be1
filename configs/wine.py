from drl_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "wine"
    config.data.channels = 13
    config.data.test_fraction = 0.2
    config.data.flip = False
    config.data.standardise = True
    config.diffusion.schedule = "cosine"
    config.diffusion.T = 30
    config.diffusion.min_noise = 0.1
    config.energy.network = "mlp"
    config.energy.ch = 64
    config.energy.N = 2
    config.energy.dropout = 0.5
    config.energy.parameterisation = "gaussians"
    config.energy.components = 3
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 20
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.99
    config.train.objective = "denoising"
    config.train.levels = "log_snr"
    config.train.batch_size = 128
    config.train.num_steps = 100
    config.log.every_steps = 50
    config.log.sample_every_steps = 100
    config.checkpoint.every_steps = 100
    config.checkpoint.keep_every_steps = 100
    config.evaluation.num_samples = 1000
    return config
