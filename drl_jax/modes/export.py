"""A trained model as one file."""

import logging

from etils import epath

from drl_jax import exported
from drl_jax import model as model_lib
from drl_jax.files import make_writable
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)


def run(workdir: epath.Path, revise: Revise) -> None:
    """Writes model.npz: what `drl_jax.load` needs of the newest checkpoint, in one file.

    `main` lets nothing be changed in that: T6's parameterisation is of `config.mcmc.b_squared`.

    Raises:
      UserError: if there is no checkpoint, or the folder cannot be written to.
    """
    run = model_lib.load_run(workdir, revise)
    make_writable(workdir)
    exported.write(run, workdir / "model.npz")
    log.info("drl_jax.load reads %s", workdir / "model.npz")
