"""All settings of a run, and the checks of their values.

Each file in `configs/` starts from `default()` and changes what it needs. Every checkpoint
contains the configuration as JSON, so that a work directory can be used without other files.
"""

import difflib
import json
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from drl_jax.errors import UserError


def default() -> ConfigDict:
    """Returns the paper's settings for CIFAR-10 (Gao et al. 2021, appendix B).

    Where the paper is silent, they are those of the authors' program.
    """
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                # Images: 'digits', 'mnist5k', a TFDS name, or 'folder:/path/to/images'. A file
                # with arrays: 'npz:/path', 'npy:/path' or 'csv:/path'. Tables and signals:
                # 'wine', 'breast_cancer', 'mnist1d', 'heartbeats' or 'premature_beats'. Points
                # in the plane: 'moons', 'rings', 'checkerboard', 'blobs', 'spirals' or
                # 'ellipse'.
                "name": "cifar10",
                "split": "train",  # of a TFDS data set, to train on
                # Of the digits, MNIST, a folder or a file with arrays: share of the examples
                # that are not trained on. TFDS data sets, points, and files with x_test have
                # test data of their own.
                "test_fraction": 0.0,
                "data_dir": "",  # where TFDS data sets are stored; '': TFDS's default
                # Whether an unreadable image in a folder is an error, instead of being skipped.
                "strict": False,
                # Colour that shows through transparent pixels of images in a folder: a name
                # such as 'white', or '#rrggbb'.
                "background": "white",
                # Number of spatial axes of an example: 1 for signals, 2 for images, 3 for
                # volumes. The network 'mlp' is for vectors, which have none, and ignores it.
                "axes": 2,
                "image_size": 32,  # length of every spatial axis [pixels]; ignored for points
                "channels": 3,  # per pixel; for points and other vectors, their dimension
                "crop": "centre",  # 'centre': to a square before resizing; 'none': no crop
                "flip": True,  # random horizontal flips
                # Whether the networks see vectors, signals and volumes with mean 0 and standard
                # deviation 1 in each feature; samples and densities are those of the data.
                "standardise": False,
                # Number of classes of the data's labels, if the networks take them; 0: they
                # take none. The data must have as many classes.
                "classes": 0,
                # Width of the uniform noise added to pixels in [-1, 1]: 0, or the distance
                # between neighbouring pixel values (2/255 for 8 bits).
                "dequantise": 0.0,
            },
            "diffusion": {
                "T": 6,  # number of energies; noise levels are 0..T
                # 'linear', the paper's, for T = 1 to 501 or 1000; or 'cosine', for any T
                "schedule": "linear",
                # sigma_bar_0, the noise of level 0, for 'cosine'; 0: 0.0074
                "min_noise": 0.0,
            },
            "energy": {
                # 'resnet', the paper's; 'cdrl_resnet', its successor's (Zhu et al. 2024);
                # 'unet', for images of any size; 'image_mlp', for small images; each of them
                # also for signals and volumes; 'mlp', for points and other vectors
                "network": "resnet",
                "ch": 128,  # channels at full resolution; for MLPs, width of each layer
                "mult": (1, 2, 2, 2),  # channels per resolution, in units of ch; not for MLPs
                "N": 8,  # residual blocks per resolution; for MLPs, residual layers
                # Sizes [pixels] at which the U-Net has attention, such as (8,), for images of
                # 32x32 that are halved twice; (): none
                "attention": (),
                # Side [pixels] of the squares that the U-Net treats as one pixel with more
                # channels. All its sizes are those of the image, divided by this.
                "patch": 1,
                # f from x and the network's output U, for 'unet' and 'image_mlp':
                # 'inner_product', 'squared_distance', or, for images of which many pixels are
                # black, 'mixture'
                "form": "inner_product",
                "dropout": 0.0,  # probability, in training; for 'unet', 'image_mlp' and 'mlp'
                # F from f: 'step': f / s_t²; 'noise': f / sigma_bar_t - |x|² / 2;
                # 'unit': f - |x|² / 2; 'uniform': f / sigma_bar_t + log-density of level t if
                # pixels were uniform; 'gaussians': the same if the data were a mixture of
                # Gaussians, which is fitted to them; 'bounded_gaussians': the same, but pixels
                # stay in their range
                "parameterisation": "step",
                "components": 20,  # of this mixture
                "dtype": "float32",  # of the products in f, in training; or 'bfloat16'
            },
            # The network that predicts where chains end (`networks.initialiser`).
            "initialiser": {
                "network": "none",  # 'unet', for images; 'mlp', for small images and points
                "ch": 64,  # channels of the U-Net at full resolution; for the MLP, its width
                "mult": (1, 1, 1),  # channels per resolution, in units of ch; not for the MLP
                "N": 3,  # blocks per resolution; for the MLP, residual layers
                "attention": (),  # sizes [pixels] at which the U-Net has attention
                "groups": 32,  # maximum number of groups of its normalisations
                "dropout": 0.0,  # probability, in training
                "learning_rate": 1e-5,
                "warmup_steps": 10_000,  # linear increase from zero
                "first_step": 500,  # of the warm-up; before it, the learning rate is zero
            },
            "mcmc": {
                "sampler": "langevin",  # or 'mala', 'hmc'
                "K": 30,  # MCMC steps per level; can be 0 unless chains start at 'x_tilde'
                # Where the chain of a level starts: 'x_tilde', at the sample of the level
                # above; 'posterior', at a draw from the conditional's normal approximation; or
                # 'initialiser', at a draw around the initialiser's prediction.
                # See `sampling.ladder.STARTS`.
                "start": "x_tilde",
                "b_squared": 2e-4,  # b², from which the step size of each level follows
                # Factor of the noise of Langevin chains and their starts when generating
                "noise_scale": 1.0,
                # Noise levels that generation passes through, evenly spaced among those of
                # training; 0: all
                "levels": 0,
                "leapfrog": (5,),  # HMC leapfrog steps: one number, or one per level
                "target_acceptance": 0.65,  # of MALA and HMC, adapted before generation
                "warmup_steps": 100,  # steps of this adaptation, per level
                # How the noise of level 0 is removed from generated examples: 'no': not at all;
                # 'tweedie': by Tweedie's formula; 'cdrl_program': with twice its gradient, as
                # in the program of Zhu et al. (2024)
                "denoise": "no",
            },
            "optim": {
                "learning_rate": 1e-4,
                "warmup_steps": 1000,  # linear increase from zero
                # Cosine decay, zero at this step; 0: constant. A file in `configs/` can make it
                # follow `train.num_steps`: `config.train.get_oneway_ref("num_steps")`.
                "decay_steps": 0,
                "beta1": 0.9,
                # 'keras': as in the authors' program; 'optax': another epsilon, and no first
                # update with a learning rate of zero. See `training.state.optimiser`.
                "adam": "keras",
                # Largest norm of the gradient of each network; a larger one is scaled down.
                # 0: no limit.
                "clip_norm": 0.0,
                "ema_decay": 0.999,  # of the exponential moving average of the parameters
            },
            "train": {
                "objective": "recovery",  # or 'denoising', which needs no MCMC
                # How x_{t+1} is drawn, for 'recovery': 'independent', by adding independent
                # noise to x_t; or 'shared', with the same noise as x_t (Zhu et al. 2024).
                "pairs": "independent",
                # Distribution of t: 'uniform', or 'log_snr', about uniform in the logarithm of
                # the signal-to-noise ratio of level t.
                "levels": "uniform",
                # Probability with which an example's label is replaced by 0, none, so that the
                # networks learn the density without a label, too. Guidance needs both.
                "label_dropout": 0.1,
                "batch_size": 256,
                "accumulate": 1,  # gradient accumulation: micro-batches per device and step
                "num_steps": 1_000_000,  # n_iters in the authors' config.py
                # Training has diverged if |loss| or |f| exceeds its limit. These are for 8x8
                # grey images and grow with the size (`training.loop.divergence_limits`);
                # inf: no limit.
                "loss_limit": 100.0,
                # Above it, the difference of f between positive and negative samples would be
                # lost in float32's rounding errors.
                "energy_limit": 1e4,
                # Of float32 products: 'default', which is bfloat16 on TPUs and TF32 on recent
                # GPUs, or 'highest', which is float32. Everything else uses 'highest'.
                "matmul_precision": "default",
            },
            "mesh": {
                "data": -1,  # devices that share a batch; -1: number of devices / fsdp
                "fsdp": 1,  # devices that share the parameters and the optimiser state
            },
            "log": {
                "every_steps": 100,  # between two log lines
                "sample_every_steps": 5000,  # between two grids of samples
            },
            "checkpoint": {
                "every_steps": 1000,  # between two checkpoints
                "keep_last": 3,  # number of newest checkpoints to keep
                "keep_every_steps": 50_000,  # keep those at multiples of this, too
            },
            "evaluation": {
                "num_samples": 1000,  # the pixel Fréchet distance uses up to 10,000 of them
                "num_data": 10_000,  # maximum number of images to compare with
                # TFDS split on which likelihood and out-of-distribution detection are measured
                "split": "test",
                "batch_size": 256,
                # Of the products in f after training; or 'bfloat16', which is faster on
                # accelerators and accurate enough for Langevin sampling.
                "dtype": "float32",
                "inception_weights": "",  # file of weights; '': no FID, KID, inception score
            },
            "likelihood": {
                "chains": 256,  # per pass of annealing, for the bounds of log Z
                "distributions": 1000,  # intermediate distributions; at least one per level
                "transitions": 5,  # of HMC, per intermediate distribution
                "leapfrog": 1,  # leapfrog steps per transition; 1 is MALA
                # Moves of `transitions` each at level 0, before an upward pass.
                "burn_in": 200,
                # Standard deviation of the Gaussian from which level 0 is tempered; white
                # noise has 1. Tempered chains can find modes within a few times this
                # distance of the origin.
                "tempered_std": 10.0,
                "target_acceptance": 0.8,  # of the transitions, adapted before annealing
                "warmup_steps": 20,  # steps of this adaptation, per level
                "max_gap": 0.1,  # largest usable gap between the bounds [bits per dimension]
            },
        }
    )


def cdrl() -> ConfigDict:
    """Returns CDRL's settings for CIFAR-10 (Zhu et al. 2024).

    Where the paper is silent, they are those of the authors' program.
    """
    config = default()
    config.diffusion.schedule = "cosine"
    config.energy.network = "cdrl_resnet"
    config.energy.mult = (1, 2, 2, 2)
    config.energy.N = 8
    config.initialiser.network = "unet"
    config.initialiser.attention = (16, 8)
    config.initialiser.dropout = 0.1
    config.mcmc.start = "initialiser"
    config.mcmc.K = 15
    config.mcmc.b_squared = 4e-4
    config.mcmc.denoise = "tweedie"
    config.optim.adam = "optax"
    config.optim.warmup_steps = 10_000
    config.optim.clip_norm = 1.0
    config.optim.ema_decay = 0.9999
    config.train.pairs = "shared"
    return config


# Names of fields in configurations that earlier versions saved, and their present names.
RENAMED = {
    "train.parts": "train.accumulate",
    "likelihood.rungs": "likelihood.distributions",
}

# Values that fields had in earlier versions, by the present name of the field; and the fields
# that have the same effect now.
REPLACED_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "train.levels": {"log_noise": {"train.levels": "log_snr"}},
    "mcmc.sampler": {
        "normal_approximation": {
            "mcmc.sampler": "langevin",
            "mcmc.start": "posterior",
            "mcmc.K": 0,
        },
    },
}

# Values of fields that did not exist yet in a saved configuration, where these are not the
# present defaults.
EARLIER = {"optim.adam": "optax"}

# Values of energy.parameterisation for which a mixture of Gaussians is fitted to the data.
FITTED = ("gaussians", "bounded_gaussians")

CHOICES = {
    "data.crop": ("centre", "none"),
    "diffusion.schedule": ("linear", "cosine"),
    "energy.network": ("resnet", "cdrl_resnet", "unet", "image_mlp", "mlp"),
    "energy.form": ("inner_product", "squared_distance", "mixture"),
    "energy.parameterisation": ("step", "noise", "uniform", *FITTED, "unit"),
    "energy.dtype": ("float32", "bfloat16"),
    "evaluation.dtype": ("float32", "bfloat16"),
    "mcmc.sampler": ("langevin", "mala", "hmc"),
    "mcmc.start": ("x_tilde", "posterior", "initialiser"),
    "mcmc.denoise": ("no", "tweedie", "cdrl_program"),
    "initialiser.network": ("none", "unet", "mlp"),
    "optim.adam": ("keras", "optax"),
    "train.objective": ("recovery", "denoising"),
    "train.pairs": ("independent", "shared"),
    "train.levels": ("uniform", "log_snr"),
    "train.matmul_precision": ("default", "highest"),
}

# Smallest values of numbers. All other numbers must be positive.
MINIMUM = {
    "seed": 0,
    "data.axes": 0,
    "data.classes": 0,
    "data.dequantise": 0,
    "data.test_fraction": 0,
    "diffusion.min_noise": 0,
    "energy.dropout": 0,
    "train.label_dropout": 0,
    "energy.ch": 4,  # the embedding of t has ch / 2 frequencies, at least two
    "initialiser.ch": 4,
    "initialiser.dropout": 0,
    "initialiser.warmup_steps": 0,
    "initialiser.first_step": 0,
    "optim.clip_norm": 0,
    "mcmc.K": 0,
    "mcmc.noise_scale": 0,
    "mcmc.levels": 0,
    "mesh.data": -1,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "optim.beta1": 0,
    "optim.ema_decay": 0,
    "evaluation.num_samples": 2,  # two images have a covariance,
    "evaluation.num_data": 4,  # and so have both halves of four
    "likelihood.burn_in": 0,
    "likelihood.tempered_std": 1,
}

# Numbers that have an upper limit must be less than it. All other whole numbers must be less
# than 2^31, since JAX counts in 32 bits.
BELOW = {
    "seed": 2**32,
    "data.axes": 4,
    "data.test_fraction": 1,
    "diffusion.min_noise": 0.9,
    "mcmc.target_acceptance": 1,
    "energy.dropout": 1,
    "train.label_dropout": 1,
    "initialiser.dropout": 1,
    "optim.beta1": 1,
    "optim.ema_decay": 1,
    "likelihood.target_acceptance": 1,
}

# Limits, which can be infinite.
CAN_BE_INFINITE = ("train.loss_limit", "train.energy_limit")

# Largest number of values of an example for which the mixtures of `FITTED` have full
# covariances.
MOST_VALUES = 1024

# Settings of images that must have these values for all other examples,
REQUIRED_WITHOUT_IMAGES = {"data.flip": False, "evaluation.inception_weights": ""}

# and for points and other vectors.
REQUIRED_FOR_POINTS = {
    **REQUIRED_WITHOUT_IMAGES,
    "data.dequantise": 0.0,
    "energy.dtype": "float32",
    "evaluation.dtype": "float32",
}

# Fields and sections that determine what the parameters mean. They cannot change when a run
# resumes; but a new run can start from the parameters (--init_from).
DEFINING = (
    "data.axes",
    "data.image_size",
    "data.channels",
    "data.classes",
    "data.dequantise",
    "data.standardise",
    "diffusion.",
    "energy.",
    "initialiser.",
)

# Of these, the fields that only change how the parameters are trained.
TRAINING_ONLY = (
    "energy.dropout",
    "energy.dtype",
    "initialiser.dropout",
    "initialiser.learning_rate",
    "initialiser.warmup_steps",
    "initialiser.first_step",
)

# Fields and sections that may change when a run resumes. The training steps do not depend on
# them, except for rounding errors.
CHANGEABLE_ON_RESUME = (
    "data.data_dir",
    "data.strict",
    "train.accumulate",
    "train.num_steps",
    "train.loss_limit",
    "train.energy_limit",
    "train.matmul_precision",
    "mesh.",
    "log.",
    "checkpoint.",
    "evaluation.",
    "likelihood.",
)


def named() -> dict[str, Path]:
    """Returns the files of the configurations that come with the package, by name.

    They are in the folder `configs`, next to the package in a clone, and inside it where it is
    installed.
    """
    package = Path(__file__).parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def load(file: str) -> ConfigDict:
    """Returns what `get_config()` of a Python file returns.

    Args:
      file: path of the file, or the name of a configuration that comes with the package.

    Raises:
      UserError: if the file does not exist or raises, or if its configuration does not have
        the fields of `default()`.
    """
    path = named().get(file, Path(file))
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"--config={file}: no such Python file; give one, or a name: {', '.join(named())}"
        )
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except (Exception, SystemExit) as error:  # the file is a program: it can raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"--config={file}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={file}: get_config() returns a {type(config).__name__}; return a "
            "ConfigDict, such as drl_jax.config.default()"
        )
    require_fields(config)
    return config


def require_fields(config: ConfigDict) -> None:
    """Raises unless the configuration has exactly the fields of `default()`.

    Raises:
      UserError: naming an unknown or missing field.
    """
    fields, known = dict(flatten(config)), dict(flatten(default()))
    for name in sorted(fields.keys() - known.keys()):
        raise UserError(unknown_field(name))
    for name in sorted(known.keys() - fields.keys()):
        raise UserError(f"config.{name} is missing: start from drl_jax.config.default()")


def unknown_field(name: str) -> str:
    """Returns the error message for a name that is not a field of the configuration."""
    if name in RENAMED:
        return f"config.{name} has been renamed: use config.{RENAMED[name]}"
    known = [f"config.{field}" for field, _ in flatten(default())]
    similar = difflib.get_close_matches(f"config.{name}", known, n=1)
    hint = f"did you mean {similar[0]}?" if similar else "drl_jax/config.py lists all fields"
    return f"config.{name} is unknown: {hint}"


def example_shape(config: ConfigDict) -> tuple[int, ...]:
    """Returns the shape of an example.

    It is [channels] for the network 'mlp', and otherwise [L, channels] for signals,
    [H, W, channels] for images or [D, H, W, channels] for volumes, with equal lengths.
    """
    data = config.data
    axes = 0 if config.energy.network == "mlp" else data.axes
    return (data.image_size,) * axes + (data.channels,)


def validate(config: ConfigDict) -> None:
    """Raises unless every value can be used, by itself and with the others.

    Raises:
      UserError: naming the field, its value, and what it must be.
    """
    require_fields(config)
    fields = dict(flatten(config))

    def invalid(name: str, advice: str) -> UserError:
        return UserError(f"config.{name} is {fields[name]!r}: {advice}")

    # First the number of steps, to which another field may refer.
    for name, example in sorted(flatten(default()), key=lambda f: f[0] != "train.num_steps"):
        value = fields[name]
        types: Any = (int, float) if isinstance(example, float) else type(example)
        is_bool = isinstance(value, bool)  # and then also an instance of int
        if not isinstance(value, types) or is_bool != isinstance(example, bool):
            raise invalid(name, f"give a value such as {example!r}")
        if replaced := REPLACED_VALUES.get(name, {}).get(value):
            flags = (f"--config.{field}={new}" for field, new in replaced.items())
            raise invalid(name, f"it has been replaced by {' '.join(flags)}")
        if name in CHOICES and value not in CHOICES[name]:
            raise invalid(name, f"use {' or '.join(map(repr, CHOICES[name]))}")
        if isinstance(example, tuple):
            if (example and not value) or not all(isinstance(n, int) and n > 0 for n in value):
                raise invalid(name, f"give positive whole numbers, such as {example or (8,)!r}")
        elif isinstance(example, int | float) and not isinstance(example, bool):
            _require_in_range(name, value)
    if not _is_colour(config.data.background):
        raise invalid("data.background", "give a colour such as 'white' or '#ff8000'")
    if config.mesh.data == 0:
        raise invalid("mesh.data", "give a number of devices, or -1 for all")
    sampler = config.mcmc.sampler
    if config.mcmc.K == 0 and config.mcmc.start == "x_tilde":
        raise invalid(
            "mcmc.K", "this needs config.mcmc.start 'posterior' or 'initialiser'; or give 1"
        )
    if config.mcmc.levels > config.diffusion.T:
        raise invalid("mcmc.levels", f"the model has {config.diffusion.T} levels")
    if config.mcmc.levels not in (0, config.diffusion.T) and config.mcmc.start == "initialiser":
        raise invalid(
            "mcmc.levels",
            "the initialiser predicts chains between successive levels of training; use "
            "config.mcmc.start 'posterior'",
        )
    if sampler in ("mala", "hmc") and config.mcmc.noise_scale != 1:
        raise invalid("mcmc.noise_scale", f"the accept step of {sampler!r} requires 1")
    if sampler in ("mala", "hmc") and config.evaluation.dtype != "float32":
        raise invalid("evaluation.dtype", f"the accept step of {sampler!r} requires 'float32'")
    # A run that ends during the warm-up has no decay.
    decay, warmup = config.optim.decay_steps, config.optim.warmup_steps
    if 0 < decay <= warmup and decay < config.train.num_steps:
        raise invalid(
            "optim.decay_steps", f"it must exceed config.optim.warmup_steps, {warmup}, or be 0"
        )
    if config.energy.attention and config.energy.network != "unet":
        raise invalid("energy.attention", "only config.energy.network 'unet' has attention")
    if config.energy.patch != 1 and config.energy.network != "unet":
        raise invalid("energy.patch", "only config.energy.network 'unet' has patches")
    if config.energy.dropout and config.energy.network not in ("unet", "image_mlp", "mlp"):
        raise invalid(
            "energy.dropout",
            "only config.energy.network 'unet', 'image_mlp' or 'mlp' has dropout",
        )
    if config.energy.dropout and config.train.objective != "denoising":
        raise invalid(
            "energy.dropout", "this needs config.train.objective 'denoising'; set it to 0"
        )
    if config.energy.form == "mixture" and (
        config.energy.network not in ("unet", "image_mlp")
        or config.energy.parameterisation != "uniform"
    ):
        raise invalid(
            "energy.form",
            "this needs config.energy.network 'unet' or 'image_mlp', and "
            "config.energy.parameterisation 'uniform'",
        )
    if config.data.classes and config.energy.network == "resnet":
        raise invalid(
            "data.classes",
            "config.energy.network 'resnet' takes no labels; use 0, or another network such as "
            "'cdrl_resnet'",
        )
    if config.data.standardise:
        if config.data.dequantise:
            raise invalid("data.dequantise", "only 8-bit images, which are not standardised")
        if config.energy.parameterisation in ("uniform", "bounded_gaussians"):
            raise invalid(
                "energy.parameterisation",
                "it is for pixels in [-1, 1], but config.data.standardise is True; use 'unit'",
            )
    is_points = config.energy.network == "mlp"
    if config.initialiser.network == "unet" and is_points:
        raise invalid("initialiser.network", "points are not images; use 'mlp'")
    if config.initialiser.network != "none" and config.train.objective != "recovery":
        raise invalid(
            "initialiser.network",
            "it learns from chains, which need config.train.objective 'recovery'; use 'none'",
        )
    if config.initialiser.network == "mlp":
        for name in ("energy.dtype", "evaluation.dtype"):
            if fields[name] != "float32":
                raise invalid(name, "config.initialiser.network 'mlp' needs 'float32'")
    if config.initialiser.attention and config.initialiser.network != "unet":
        raise invalid(
            "initialiser.attention", "only config.initialiser.network 'unet' has attention"
        )
    if config.diffusion.min_noise and config.diffusion.schedule != "cosine":
        raise invalid("diffusion.min_noise", "only config.diffusion.schedule 'cosine' has it")
    if config.energy.network == "image_mlp":
        for name in ("energy.dtype", "evaluation.dtype"):
            if fields[name] != "float32":
                raise invalid(name, "config.energy.network 'image_mlp' needs 'float32'")
    if config.data.axes == 0 and not is_points:
        raise invalid(
            "data.axes",
            f"config.energy.network {config.energy.network!r} needs 1 for signals, 2 for "
            "images or 3 for volumes; vectors need the network 'mlp'",
        )
    if config.data.axes != 2 and not is_points:
        for name, wanted in REQUIRED_WITHOUT_IMAGES.items():
            if fields[name] != wanted:
                raise invalid(
                    name, f"config.data.axes is {config.data.axes}; use {wanted!r}, or images"
                )
    if is_points:
        if config.energy.parameterisation in ("uniform", "bounded_gaussians"):
            raise invalid("energy.parameterisation", "points have no pixels; use 'unit'")
        for name, wanted in REQUIRED_FOR_POINTS.items():
            if fields[name] != wanted:
                raise invalid(
                    name,
                    "config.energy.network 'mlp' is for points and other vectors, for which "
                    f"it must be {wanted!r}",
                )
    values = math.prod(example_shape(config))
    if config.energy.parameterisation in FITTED and values > MOST_VALUES:
        raise invalid(
            "energy.parameterisation",
            f"the covariances of examples with {values} values are too large (limit: "
            f"{MOST_VALUES}); use 'uniform'",
        )


def _is_colour(name: str) -> bool:
    """Returns whether Pillow knows this opaque colour."""
    from PIL import ImageColor  # imported here because only this check needs it

    try:
        return len(ImageColor.getrgb(name)) == 3
    except ValueError:
        return False


def _require_in_range(name: str, value: float) -> None:
    """Raises unless a number is within `MINIMUM` and `BELOW`, and finite if it must be."""
    low = MINIMUM.get(name)
    high = BELOW.get(name, 2**31 if isinstance(value, int) else math.inf)
    in_range = value < high or (value == math.inf and name in CAN_BE_INFINITE)
    if in_range and (value > 0 if low is None else value >= low):
        return
    wanted = "positive" if low is None else f"{low} or more"
    if name in BELOW or high <= value < math.inf:
        wanted += f" and less than {high}"
    elif not math.isfinite(value):
        wanted += " and finite"
    raise UserError(f"config.{name} is {value}: it must be {wanted}")


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every field as (dotted name, value), in order."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Returns the configuration that `to_json` saved, in this or an earlier version.

    Lists become tuples again. Old names of fields (`RENAMED`) become the present ones, and
    `REPLACED_VALUES` are replaced. A field that did not exist yet takes the value with which
    this version behaves as the earlier one did: its default, or that in `EARLIER`.

    Raises:
      UserError: if the saved configuration has a field that this version lacks, or a value of
        the wrong type.
    """
    config = default()
    known = dict(flatten(config))
    config.update_from_flattened_dict(EARLIER)
    replaced: dict[str, Any] = {}
    for saved, value in flatten(ConfigDict(values)):
        name = RENAMED.get(saved, saved)
        if name not in known:
            raise UserError(
                f"the saved configuration has the unknown field config.{saved}: use the "
                "version of drl_jax that saved it, or a newer one"
            )
        if isinstance(value, list):
            value = tuple(value)
        elif value in REPLACED_VALUES.get(name, ()):
            replaced |= REPLACED_VALUES[name][value]
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the saved configuration has config.{name} = {value!r}: it must be a value "
                f"such as {known[name]!r}"
            ) from error
    config.update_from_flattened_dict(replaced)
    return config


def require_resumable(
    saved: ConfigDict, wanted: ConfigDict, with_changes: bool = False
) -> list[str]:
    """Returns the differences between a run's configuration and one to resume it with.

    The path of a folder of images may change: `storage.data_record` compares the images.

    Args:
      saved: configuration of the run.
      wanted: configuration to resume it with.
      with_changes: whether they may differ in fields that change the training steps, such as
        those of the optimiser and the sampler.

    Returns:
      one line per field that differs, with both values.

    Raises:
      UserError: naming every field that differs and must not: without `with_changes`, those
        that would change the training steps; with it, those that determine what the parameters
        mean.
    """
    different = differences(dict(flatten(saved)), dict(flatten(wanted)))
    if with_changes:
        # F is f divided by the squared step sizes, with the parameterisation 'step'.
        is_step = wanted.energy.parameterisation == "step"
        defining = (*DEFINING, "mcmc.b_squared") if is_step else DEFINING
        fixed = [line for line in different if line.startswith(defining)]
        fixed = [line for line in fixed if not line.startswith(TRAINING_ONLY)]
        advice = "restore the old values, or start a new run from its parameters (--init_from)"
    else:
        changeable: tuple[str, ...] = CHANGEABLE_ON_RESUME
        if all(config.data.name.startswith("folder:") for config in (saved, wanted)):
            changeable = (*changeable, "data.name")
        fixed = [line for line in different if not line.startswith(changeable)]
        advice = (
            "restore the old values, give another --workdir, or add --resume_with_changes to "
            "continue with the new ones"
        )
    if fixed:
        raise UserError(
            f"the work directory has another configuration ({'; '.join(fixed)}): {advice}"
        )
    return different


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns one line per name whose values differ, with both values, sorted by name."""
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
