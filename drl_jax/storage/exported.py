"""Exported models: configuration, training step and parameters in one small .npz file."""

import json
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import method, standardisation
from drl_jax.errors import UserError, as_user_error
from drl_jax.networks.energy import Params
from drl_jax.storage import npz
from drl_jax.storage.atomic import write_atomically

SUFFIX = ".npz"

ABOUT = "about"  # name of the array that holds configuration and step, as JSON
PREFIX = "params/"  # prefix of the names of the parameters


class Exported(NamedTuple):
    """Content of an exported file.

    Attributes:
      config: configuration of the training run.
      step: number of training steps.
      params: exponential moving average of the parameters, spectrally normalised, as float32
        numpy arrays.
    """

    config: ConfigDict
    step: int
    params: Params


def write(
    config: ConfigDict, step: int, params: Params, file: epath.Path, dtype: str = "float32"
) -> None:
    """Writes a model.

    Args:
      config: configuration of the training run.
      step: number of training steps.
      params: normalised parameters.
      file: path of the file.
      dtype: of the parameters in the file: 'float32', or 'float16', which halves its size and
        rounds them to 11 significant bits. A standardisation keeps float32.

    Raises:
      UserError: if the file cannot be written.
    """
    about = {"config": config_lib.to_json(config), "step": step}
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {
        f"{PREFIX}{name}": np.asarray(
            value, "float32" if name.startswith(f"{standardisation.NAME}/") else dtype
        )
        for name, value in flat.items()
    }
    content = npz.encode({ABOUT: np.array(json.dumps(about))} | arrays, compress=True)
    write_atomically(file, content)


def read(file: epath.Path) -> Exported:
    """Reads a model that `write` wrote.

    Raises:
      UserError: if the file does not exist, is damaged or is not an exported model, or if the
        shapes of its parameters are not those of the network that this version builds from its
        configuration.
    """
    with as_user_error(f"cannot read {file}"):
        content = file.read_bytes() if file.is_file() else None
    if content is None:
        raise UserError(f"there is no exported model {file}")
    try:
        arrays = npz.decode(content)
        about = json.loads(str(arrays.pop(ABOUT)))
        saved, step = about["config"], int(about["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged or not an exported model: export it again with --mode=export"
        ) from error
    config = config_lib.from_json(saved)
    flat = {
        name.removeprefix(PREFIX): value.astype(np.float32) for name, value in arrays.items()
    }
    params: Params = traverse_util.unflatten_dict(flat, sep="/")
    energy = method.from_config(config).energy
    expected, _ = jax.eval_shape(
        lambda key: energy.normalise(*energy.init(key)), jax.random.key(0)
    )
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
        raise UserError(
            f"the parameters in {file} do not fit the network that this version builds from "
            "its config: export it again with --mode=export"
        )
    return Exported(config, step, params)
