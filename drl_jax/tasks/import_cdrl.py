"""The task `import_cdrl`: turns a checkpoint of the authors of CDRL into a work directory."""

import logging

import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.errors import UserError
from drl_jax.networks.initialiser import NAME
from drl_jax.storage import cdrl_checkpoint
from drl_jax.storage import checkpoints as checkpoints_lib
from drl_jax.storage.cdrl_checkpoint import Parts
from drl_jax.training import state as train_state
from drl_jax.training.state import TrainState

log = logging.getLogger(__name__)

# Settings of the method, which the weights presuppose (Zhu et al. 2024).
METHOD = (
    "diffusion.T",
    "diffusion.schedule",
    "energy.network",
    "energy.parameterisation",
    "initialiser.network",
    "mcmc.start",
    "mcmc.sampler",
    "mcmc.K",
    "mcmc.b_squared",
    "mcmc.denoise",
    "train.objective",
    "train.pairs",
)

# Sections whose other fields have their default values.
SECTIONS = ("energy", "initialiser", "diffusion", "mcmc")


def run(config: ConfigDict, workdir: epath.Path, checkpoint: str, image_size: int) -> None:
    """Converts a checkpoint of the authors' PyTorch program for CDRL.

    Writes to `workdir`:
      checkpoints/: one checkpoint, from which every other task continues. It is that of step 0:
        the moments of the optimisers and the number of steps are not imported.

    Args:
      config: everything that the checkpoint and `METHOD` do not determine: data, optimiser.
      workdir: must hold no checkpoints yet.
      checkpoint: a file of the program, such as best.pth.tar.
      image_size: height and width of the images, which the checkpoint does not record.

    Raises:
      UserError: if `workdir` already holds checkpoints or cannot be written to, or the
        checkpoint cannot be used (see `storage.cdrl_checkpoint`).
    """
    checkpoints_lib.require_none(workdir)
    parts = cdrl_checkpoint.extract(cdrl_checkpoint.read(checkpoint), image_size)
    config = configure(config, parts, image_size)
    state = to_state(parts, config)
    # Last, so that a checkpoint that cannot be used leaves no folder.
    checkpoints_lib.save_first(workdir, config, int(state.step), state)
    network = ", ".join(f"{name} = {value}" for name, value in parts.energy._asdict().items())
    log.info("imported an energy with %s, and its initialiser, into %s", network, workdir)


def configure(config: ConfigDict, parts: Parts, image_size: int) -> ConfigDict:
    """Returns the configuration with the networks of a checkpoint and the settings of CDRL.

    Raises:
      UserError: if they do not go with the rest of the configuration.
    """
    config = config.copy_and_resolve_references()
    for section in SECTIONS:
        config[section] = config_lib.default()[section]
    energy, initialiser = parts.energy._asdict(), parts.initialiser._asdict()
    method = dict(config_lib.flatten(config_lib.cdrl()))
    fields = {name: method[name] for name in METHOD} | {
        "data.axes": 2,
        "data.image_size": image_size,
        "data.channels": energy.pop("channels"),
        "data.classes": energy.pop("classes"),
    }
    if initialiser.pop("classes") != parts.energy.classes:
        raise UserError(
            "the networks of the CDRL checkpoint have labels of different numbers of classes: "
            "give a checkpoint that the authors' CDRL program wrote"
        )
    fields |= {f"energy.{name}": value for name, value in energy.items()}
    fields |= {f"initialiser.{name}": value for name, value in initialiser.items()}
    config.update_from_flattened_dict(fields)
    config_lib.validate(config)
    return config


def to_state(parts: Parts, config: ConfigDict) -> TrainState:
    """Returns the training state with the parameters of a checkpoint, at step 0."""
    params = parts.params | {NAME: parts.initialiser_params}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=parts.ema | {NAME: parts.initialiser_ema},
        vectors=parts.vectors,
        opt_state=train_state.optimiser(config).init(params),
    )
