"""The task `export`: writes a trained model to one file."""

import logging

from etils import epath

from drl_jax.storage import exported
from drl_jax.storage.atomic import make_writable
from drl_jax.storage.runs import Run

log = logging.getLogger(__name__)


def run(run: Run, workdir: epath.Path, dtype: str) -> None:
    """Writes the model as one file, for `drl_jax.load`.

    The file contains the configuration of the training run, because it is part of the model:
    for example, the parameterisation of T6 depends on `config.mcmc.b_squared`. `main` therefore
    accepts no --config.FIELD=VALUE for this task.

    Writes to `workdir`:
      model.npz: the configuration, the step, and the averaged, normalised parameters.

    Args:
      run: the trained model.
      workdir: folder of the file.
      dtype: of the parameters in the file, 'float32' or 'float16'.

    Raises:
      UserError: if the folder cannot be written to.
    """
    make_writable(workdir)
    exported.write(run.config, run.step, run.model.params, workdir / "model.npz", dtype)
    log.info("wrote %s; drl_jax.load reads it", workdir / "model.npz")
