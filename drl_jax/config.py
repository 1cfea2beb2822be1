"""Every knob of a run, in one screen, and what makes a setting impossible.

A file in `configs/` starts from `default()` and changes what it needs. The configuration
travels inside each checkpoint as JSON, so that a work directory explains itself.
"""

import json
import math
import runpy
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from drl_jax.errors import UserError


def default() -> ConfigDict:
    """Returns the paper's settings for CIFAR-10 (Gao et al. 2021, appendix B)."""
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                # 'digits', a TFDS name, 'folder:/path/to/images', or, of points in the plane,
                # 'moons', 'rings', 'checkerboard', 'blobs', 'spirals', 'ellipse'.
                "name": "cifar10",
                "split": "train",  # of a TFDS data set
                "data_dir": "",  # where TFDS data lie; '' is TFDS's own place
                "image_size": 32,  # points have none: it is not read
                "channels": 3,  # of an image, or coordinates of a point
                "crop": "centre",  # before resizing: 'centre' square or 'none'
                "flip": True,  # random horizontal flips
                "dequantise": 0.0,  # width of uniform noise: how far pixel values are apart
            },
            "diffusion": {
                "T": 6,  # number of energies; noise levels are 0..T
            },
            "energy": {
                "network": "resnet",  # for images; 'mlp': for points
                "ch": 128,  # width of the first resolution; of every layer of an MLP
                "mult": (1, 2, 2, 2),  # width of each resolution, in units of ch; not of an MLP
                "N": 8,  # residual blocks a resolution; residual layers of an MLP
                # F = f / s_t²; 'noise': f / sigma_bar_t - |x|² / 2; 'unit': f - |x|² / 2
                "parameterisation": "step",
                "dtype": "float32",  # of f's products; 'bfloat16': as fast as TPUs are
            },
            "mcmc": {
                "sampler": "langevin",  # or 'mala', 'hmc', 'normal_approximation'
                "K": 30,  # its steps a level
                "b_squared": 2e-4,  # b²: sets every level's step size
                "noise_scale": 1.0,  # of the noise when generating
                "leapfrog": (5,),  # steps of an HMC trajectory, for all levels or for each
                "target_acceptance": 0.65,  # of MALA and HMC, after a warm-up when generating
                "warmup_steps": 100,  # of that warm-up, a level
            },
            "optim": {
                "learning_rate": 1e-4,
                "warmup_steps": 1000,
                "decay_steps": 0,  # cosine decay to zero until then; 0: constant
                "beta1": 0.9,
                "ema_decay": 0.999,
            },
            "train": {
                "objective": "recovery",  # or 'denoising', which needs no chain
                "levels": "uniform",  # as they are drawn; 'log_noise': evenly in log sigma_bar
                "batch_size": 256,
                "parts": 1,  # of a device's examples, one after the other, to save memory
                "num_steps": 240_000,
                "loss_limit": 100.0,  # |loss| above it is divergence
                "energy_limit": 1e4,  # and |f|: float32 has few digits left for the loss
            },
            "mesh": {
                "data": -1,  # devices that share a batch; -1: all that fsdp leaves
                "fsdp": 1,  # and so many, what training carries of the parameters too
            },
            "log": {
                "every_steps": 100,
                "sample_every_steps": 5000,
            },
            "checkpoint": {
                "every_steps": 1000,
                "keep_last": 3,
                "keep_every_steps": 50_000,
            },
            "evaluation": {
                "num_samples": 1000,  # of at most 10,000 for the distance of raw pixels
                "num_data": 10_000,  # at most so many images stand for the data
                "batch_size": 256,
                "inception_weights": "",  # path of their file; '': no FID, KID, IS
            },
            "likelihood": {
                "chains": 256,  # annealed down and up, for bounds of log Z
                "rungs": 1000,  # densities on the way; at least one a level
                "transitions": 5,  # of HMC at each
                "leapfrog": 1,  # steps of one; 1 is MALA
                "burn_in": 200,  # moves on level 0 that make samples of it out of data
                "target_acceptance": 0.8,
                "warmup_steps": 20,  # a level
                "max_gap": 0.1,  # between the bounds, bits a dimension; wider is refused
            },
        }
    )


def load(file: str) -> ConfigDict:
    """Returns what `get_config()` of a Python file returns.

    Raises:
      UserError: if there is no such file, or it gives no configuration.
    """
    if not file.endswith(".py") or not epath.Path(file).is_file():
        raise UserError(f"--config={file}: there is no such Python file")
    try:
        config = runpy.run_path(file)["get_config"]()
    except Exception as error:  # the file is a program: it may raise anything
        raise UserError(f"--config={file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={file}: its get_config() returns no ConfigDict")
    return config


CHOICES = {
    "data.crop": ("centre", "none"),
    "energy.network": ("resnet", "mlp"),
    "energy.parameterisation": ("step", "noise", "unit"),
    "energy.dtype": ("float32", "bfloat16"),
    "mcmc.sampler": ("langevin", "mala", "hmc", "normal_approximation"),
    "train.objective": ("recovery", "denoising"),
    "train.levels": ("uniform", "log_noise"),
}

# What of an image's settings points in the plane leave to choose.
OF_POINTS = {
    "data.channels": 2,
    "data.flip": False,
    "data.dequantise": 0.0,
    "evaluation.inception_weights": "",
    "energy.dtype": "float32",
}

# Changing these between two starts on one work directory cannot change what any
# training step computes, but for rounding.
FREE_ON_RESUME = (
    "train.parts",
    "train.num_steps",
    "train.loss_limit",
    "train.energy_limit",
    "mesh.",
    "log.",
    "checkpoint.",
    "evaluation.",
    "likelihood.",
)


def validate(config: ConfigDict) -> None:
    """Refuses values that no run can use.

    Raises:
      UserError: naming the field, its value, and what it must be.
    """
    positive = (
        "data.image_size",
        "data.channels",
        "diffusion.T",
        "energy.ch",
        "energy.N",
        "mcmc.K",
        "mcmc.b_squared",
        "mcmc.target_acceptance",
        "mcmc.warmup_steps",
        "optim.learning_rate",
        "train.batch_size",
        "train.parts",
        "train.num_steps",
        "train.loss_limit",
        "train.energy_limit",
        "mesh.fsdp",
        "log.every_steps",
        "log.sample_every_steps",
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.keep_every_steps",
        "evaluation.num_samples",
        "evaluation.num_data",
        "evaluation.batch_size",
        "likelihood.chains",
        "likelihood.rungs",
        "likelihood.transitions",
        "likelihood.leapfrog",
        "likelihood.target_acceptance",
        "likelihood.warmup_steps",
        "likelihood.max_gap",
    )
    fields, known = dict(flatten(config)), dict(flatten(default()))
    for name in sorted(fields.keys() ^ known.keys()):
        problem = "is unknown" if name in fields else "is missing"
        raise UserError(f"config.{name} {problem}: start from drl_jax.config.default()")
    for name, example in known.items():
        kind = (int, float) if isinstance(example, float) else type(example)
        if not isinstance(fields[name], kind):
            raise UserError(
                f"config.{name} is {fields[name]!r}: give a value such as {example!r}"
            )
    for name in positive:
        if not 0 < fields[name] < math.inf:
            raise UserError(f"config.{name} is {fields[name]}: it must be positive")
    if config.energy.ch < 4:
        raise UserError(
            f"config.energy.ch is {config.energy.ch}: it must be 4 or more, for two "
            "frequencies of t"
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed is {config.seed}: it must lie in [0, 2**32)")
    mult = config.energy.mult
    if not mult or not all(isinstance(m, int) and m > 0 for m in mult):
        raise UserError(f"config.energy.mult is {mult}: give positive whole multipliers")
    if config.mesh.data != -1 and config.mesh.data < 1:
        raise UserError(
            f"config.mesh.data is {config.mesh.data}: give a number of devices, or -1 for all"
        )
    leapfrog = config.mcmc.leapfrog
    if not leapfrog or not all(isinstance(n, int) and n > 0 for n in leapfrog):
        raise UserError(f"config.mcmc.leapfrog is {leapfrog}: give positive whole numbers")
    sampler, objective, T = config.mcmc.sampler, config.train.objective, config.diffusion.T
    for name, value in (("mcmc.sampler", sampler), ("train.objective", objective)):
        if value in ("normal_approximation", "denoising") and T != 1000:
            raise UserError(
                f"config.{name} is {value!r}, which needs the small noise of T = 1000 levels; "
                f"this model has T = {T}"
            )
    if sampler == "normal_approximation" and config.mcmc.K != 1:
        raise UserError(
            f"config.mcmc.K is {config.mcmc.K}: {sampler!r} is one draw, set it to 1"
        )
    if sampler in ("mala", "hmc") and config.mcmc.noise_scale != 1:
        raise UserError(
            f"config.mcmc.noise_scale is {config.mcmc.noise_scale}: the accept step of "
            f"{sampler!r} knows no other than 1"
        )
    for name in ("mcmc.target_acceptance", "likelihood.target_acceptance"):
        if fields[name] >= 1:
            raise UserError(f"config.{name} is {fields[name]}: it must lie in (0, 1)")
    for name in ("optim.beta1", "optim.ema_decay"):
        if not 0 <= fields[name] < 1:
            raise UserError(f"config.{name} is {fields[name]}: it must lie in [0, 1)")
    for name in (
        *("optim.warmup_steps", "optim.decay_steps", "mcmc.noise_scale"),
        *("likelihood.burn_in", "data.dequantise"),
    ):
        if not 0 <= fields[name] < math.inf:
            raise UserError(f"config.{name} is {fields[name]}: it must not be negative")
    if 0 < fields["optim.decay_steps"] <= fields["optim.warmup_steps"]:
        raise UserError(
            f"config.optim.decay_steps is {fields['optim.decay_steps']}: it must come after "
            f"the {fields['optim.warmup_steps']} warm-up steps, or be 0"
        )
    for name, choices in CHOICES.items():
        if fields[name] not in choices:
            raise UserError(
                f"config.{name} is {fields[name]!r}: use {' or '.join(map(repr, choices))}"
            )
    if config.energy.network == "mlp":
        for name, wanted in OF_POINTS.items():
            if fields[name] != wanted:
                raise UserError(
                    f"config.{name} is {fields[name]!r}: config.energy.network 'mlp' is for "
                    f"points in the plane, with which it must be {wanted!r}"
                )


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each leaf as (dotted name, value), in order."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Inverse of `to_json`: lists become tuples again.

    A field that the program did not have when this was saved takes its default, which is
    what it did then.
    """

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: restore(v) for name, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    config = default()
    config.update(restore(values))
    return config


def require_resumable(saved: ConfigDict, wanted: ConfigDict) -> None:
    """Refuses to go on with a run under a configuration that would change it.

    Raises:
      UserError: naming every field that differs, with both values.
    """
    different = [
        difference
        for difference in differences(dict(flatten(saved)), dict(flatten(wanted)))
        if not difference.startswith(FREE_ON_RESUME)
    ]
    if different:
        raise UserError(
            "the work directory was made with another config ("
            + "; ".join(different)
            + "): give another --workdir or the old values"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns every name whose values differ, with both values."""
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
