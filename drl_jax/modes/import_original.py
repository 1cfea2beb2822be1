"""The authors' checkpoints as work directories."""

import logging

from etils import epath
from ml_collections import ConfigDict

from drl_jax import original
from drl_jax.checkpoints import Checkpoints
from drl_jax.errors import UserError
from drl_jax.files import make_writable

log = logging.getLogger(__name__)


def run(config: ConfigDict, tf_checkpoint: str, image_size: int, workdir: epath.Path) -> None:
    """Makes a work directory of a checkpoint of the authors' TensorFlow program.

    Raises:
      UserError: if the folder holds checkpoints already or cannot be written to, or this one
        cannot be used (`original`).
    """
    folder = workdir / "checkpoints"
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{workdir} holds checkpoints already: give another --workdir")
    tensors = original.read(tf_checkpoint)
    config = original.configure(config, tensors, image_size)
    state = original.to_state(tensors, config)
    make_writable(workdir)  # all that can be known to be wrong was found before this line
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(state)
    network = ", ".join(f"{name} = {value}" for name, value in config.energy.items())
    log.info("step %d of a network with %s is in %s", state.step, network, workdir)
