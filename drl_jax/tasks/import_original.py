"""The task `import_original`: turns a checkpoint of the authors into a work directory."""

import logging

import jax
import jax.numpy as jnp
import optax
from etils import epath
from ml_collections import ConfigDict

from drl_jax.storage import checkpoints as checkpoints_lib
from drl_jax.storage import tf_checkpoint as tf_checkpoint_lib
from drl_jax.training import state as train_state
from drl_jax.training.state import TrainState

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: epath.Path, tf_checkpoint: str, image_size: int) -> None:
    """Converts a checkpoint of the authors' TensorFlow program.

    Writes to `workdir`:
      checkpoints/: one checkpoint, from which every other task continues.

    Args:
      config: everything that the checkpoint does not determine: data, sampler, optimiser. By
        default the optimiser is Adam as in their program (`training.state.optimiser`).
      workdir: must hold no checkpoints yet.
      tf_checkpoint: prefix of the checkpoint's .index and .data files.
      image_size: height and width of the images, which the checkpoint does not record.

    Raises:
      UserError: if `workdir` already holds checkpoints or cannot be written to, or the
        checkpoint cannot be used (see `storage.tf_checkpoint`).
    """
    checkpoints_lib.require_none(workdir)
    tensors = tf_checkpoint_lib.read(tf_checkpoint)
    config = tf_checkpoint_lib.configure(config, tensors, image_size)
    state = to_state(tf_checkpoint_lib.extract(tensors, config), config)
    # Last, so that a checkpoint that cannot be used leaves no folder.
    checkpoints_lib.save_first(workdir, config, int(state.step), state)
    network = ", ".join(f"{name} = {value}" for name, value in config.energy.items())
    log.info("imported step %d of a network with %s into %s", state.step, network, workdir)


def to_state(parts: tf_checkpoint_lib.Parts, config: ConfigDict) -> TrainState:
    """Returns a training state with the given parts.

    The averaged parameters replace raw ones that are missing. Without Adam's moments, these
    start at 0 and the warm-up of the learning rate restarts. The log mentions both.
    """
    params = parts.params
    if params is None:
        log.info("the checkpoint has no raw parameters: the averaged ones replace them")
        params = jax.tree.map(jnp.copy, parts.ema)
    opt_state = train_state.optimiser(config).init(params)
    if parts.moments is None:
        log.info("the checkpoint has no moments of Adam: they and the warm-up start again")
    else:
        updates, mu, nu = parts.moments
        opt_state = optax.tree.set(opt_state, count=updates, mu=mu, nu=nu)
    return TrainState(parts.step, params, parts.ema, parts.vectors, opt_state)
