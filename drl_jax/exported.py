"""A trained model as one small file: its configuration and what it generates with."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import method, parallel
from drl_jax import model as model_lib
from drl_jax.energies.energy import Params
from drl_jax.errors import UserError
from drl_jax.files import write_whole
from drl_jax.model import Model, Run, generating

SUFFIX = ".npz"

# The models that come with the package, by name.
SHIPPED = epath.resource_path("drl_jax") / "shipped"


def load(
    path_or_name: str, revise: Callable[[ConfigDict], ConfigDict] = lambda config: config
) -> Run:
    """Loads a work directory, an exported file, or a model that comes with the package.

    Args:
      path_or_name: of it.
      revise: changes the configuration in what can change after training, such as the
        sampler; what was learned stays as it was.

    Raises:
      UserError: if there is none.
    """
    path = epath.Path(path_or_name).expanduser()
    shipped = SHIPPED / f"{path_or_name}{SUFFIX}"
    if path.is_dir():
        return model_lib.load_run(path, revise)
    if path.suffix == SUFFIX:
        return read(path, revise)
    if "/" not in path_or_name and shipped.is_file():
        return read(shipped, revise)
    names = ", ".join(repr(file.stem) for file in SHIPPED.glob(f"*{SUFFIX}"))
    raise UserError(
        f"{path_or_name!r} is no work directory, no exported model, and none that comes with "
        f"the package ({names})"
    )


def write(run: Run, file: epath.Path) -> None:
    """Writes a model: its config, step and normalised parameters.

    Raises:
      UserError: if the file cannot be written.
    """
    about = {"config": config_lib.to_json(run.config), "step": run.step}
    arrays: dict[str, Any] = {
        f"params/{name}": np.asarray(value)
        for name, value in traverse_util.flatten_dict(run.model.params, sep="/").items()
    }
    encoded = io.BytesIO()
    np.savez_compressed(encoded, about=np.array(json.dumps(about)), **arrays)
    write_whole(file, encoded.getvalue())


def read(
    file: epath.Path, revise: Callable[[ConfigDict], ConfigDict] = lambda config: config
) -> Run:
    """Reads what `write` wrote, and changes its configuration as `load` does.

    Raises:
      UserError: if there is no such file, or it is not one of these.
    """
    if not file.is_file():
        raise UserError(f"there is no exported model {file}")
    try:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            flat = {name: arrays[name] for name in arrays.files}
        about = json.loads(str(flat.pop("about")))
        config, step = config_lib.from_json(about["config"]), int(about["step"])
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no exported model, or damaged: export it again") from error
    params: Params = traverse_util.unflatten_dict(
        {name.removeprefix("params/"): value for name, value in flat.items()}, sep="/"
    )
    built = method.from_config(config)
    init, normalise = built.energy.init, built.energy.normalise
    needed = jax.eval_shape(lambda key: normalise(*init(key))[0], jax.random.key(0))
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, needed):
        raise UserError(f"{file} is not of this version's network: export it again")
    config = revise(config)
    learned = generating(built, config.mcmc)
    model = Model(learned, params, parallel.make_mesh(), config.evaluation.batch_size)
    return Run(config, model, step)
