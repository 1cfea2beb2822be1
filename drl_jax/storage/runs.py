"""Trained models: loads them from work directories, exported files and the package itself.

Only what sampling needs is restored from a checkpoint: the averaged parameters and the vectors
of the spectral normalisation, but not the raw parameters and Adam's moments. Each device reads
its share of every kernel, and the shares are gathered when the parameters are normalised.
"""

import functools
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.errors import UserError, as_user_error
from drl_jax.model import Model
from drl_jax.networks.energy import Energy, Params, Vectors
from drl_jax.runtime import sharding
from drl_jax.runtime.matmul_precision import full_precision
from drl_jax.storage import checkpoints, exported
from drl_jax.storage.checkpoints import Checkpoints

# Folder of the models that come with the package; their names are those of its files.
SHIPPED = epath.resource_path("drl_jax") / "shipped"


class Run(NamedTuple):
    """The result of a training run.

    Attributes:
      config: configuration of the run.
      model: model with the exponential moving average of the parameters.
      step: number of training steps.
    """

    config: ConfigDict
    model: Model
    step: int


def load(path_or_name: str | os.PathLike) -> Run:
    """Loads a trained model.

    Args:
      path_or_name: a work directory, whose newest undamaged checkpoint is used; a file
        written by --mode=export; or the name of a model that comes with the package, such as
        'digits'. A folder with the same name takes precedence.

    Raises:
      UserError: if there is no such model, or it cannot be read.
    """
    name = os.fspath(path_or_name)
    path, shipped = epath.Path(name).expanduser(), SHIPPED / f"{name}{exported.SUFFIX}"
    with as_user_error(f"cannot read {path}"):
        is_folder = path.is_dir()
    if is_folder:
        return load_workdir(path)
    if path.suffix == exported.SUFFIX:
        return _load_exported(path)
    if "/" not in name and shipped.is_file():
        return _load_exported(shipped)
    names = ", ".join(repr(file.stem) for file in SHIPPED.iterdir())
    raise UserError(
        f"{name!r} is not a work directory, an exported model ({exported.SUFFIX}) or the name "
        f"of a model that comes with the package ({names})"
    )


def load_workdir(workdir: epath.Path) -> Run:
    """Loads the newest undamaged checkpoint of a work directory.

    Raises:
      UserError: if the folder cannot be read or has no undamaged checkpoint, or the checkpoint
        does not fit this version's network.
    """
    restored = None
    if checkpoints.exist(workdir):
        mesh = sharding.make_mesh(fsdp=jax.device_count())
        with Checkpoints(workdir) as saved:
            restored = saved.restore(
                _abstract, lambda shape: sharding.fully_sharded(shape, mesh)
            )
    if restored is None:
        raise UserError(
            f"there is no checkpoint in {workdir}: train there first (--mode=train), or give "
            "the --workdir of a trained model"
        )
    config, state = restored
    energy = method.from_config(config).energy
    params = generation_params(energy, state["ema"], state["vectors"], sharding.make_mesh())
    return _run(config, params, int(state["step"]))


class Parameters(NamedTuple):
    """The parameters of a checkpoint, from which another run can start.

    Attributes:
      config: configuration of the run that trained them.
      step: number of training steps.
      params: raw parameters.
      ema: exponential moving average of the raw parameters.
      vectors: vectors of the power iterations.
    """

    config: ConfigDict
    step: int
    params: Params
    ema: Params
    vectors: Vectors


def load_parameters(path: str, config: ConfigDict, mesh: Mesh) -> Parameters:
    """Loads the parameters of a checkpoint for the network of another configuration.

    Args:
      path: WORKDIR, for its newest undamaged checkpoint, or WORKDIR:STEP.
      config: the other configuration. Its network must have parameters of the same shapes.
      mesh: devices over which the parameters are sharded (`sharding.fully_sharded`).

    Raises:
      UserError: if there is no such checkpoint, it is damaged, or its parameters have other
        shapes; the message then names the fields of the network that differ.
    """
    match = re.fullmatch(r"(.+):(\d+)", path)
    folder, step = (match[1], int(match[2])) if match else (path, None)
    workdir = epath.Path(folder)

    def abstract(saved: ConfigDict) -> PyTree:
        found = _abstract(saved)
        if found != _abstract(config):
            different = config_lib.differences(
                dict(config_lib.flatten(saved)), dict(config_lib.flatten(config))
            )
            fields = [line for line in different if line.startswith(config_lib.DEFINING)]
            raise UserError(
                f"the parameters in {workdir} do not fit the network of this configuration "
                f"({'; '.join(fields)}): use the old values"
            )
        return found | {"params": found["ema"]}

    restored = None
    if checkpoints.exist(workdir):
        with Checkpoints(workdir) as saved:
            restored = saved.restore(
                abstract, lambda shape: sharding.fully_sharded(shape, mesh), step
            )
    if restored is None:
        raise UserError(
            f"there is no checkpoint in {workdir}: give WORKDIR or WORKDIR:STEP of a run that "
            "has been trained"
        )
    found, state = restored
    return Parameters(config=found, **state | {"step": int(state["step"])})


def reconfigure(run: Run, config: ConfigDict) -> Run:
    """Returns the run with the settings of `config` that may change after training.

    These are the sampler, its noise scale, the batch size, and the dtype in which the network
    multiplies. The parameters stay the same, and so does the parameterisation, even if
    `config.mcmc.b_squared` changes.

    Raises:
      UserError: if the sampler has settings for another number of levels.
    """
    model = Model.create(
        method.for_generation(run.model.method, config),
        run.model.params,
        run.model.mesh,
        config.evaluation.batch_size,
    )
    return Run(config, model, run.step)


@functools.partial(jax.jit, static_argnames=("energy", "mesh"))
@full_precision
def generation_params(energy: Energy, ema: Params, vectors: Vectors, mesh: Mesh) -> Params:
    """Returns the parameters that images are generated with, replicated over the mesh.

    These are the exponential moving average of the raw parameters, spectrally normalised.

    Args:
      energy: the network.
      ema: averaged raw parameters, sharded in any way.
      vectors: vectors of the power iterations.
      mesh: devices of the result; the same devices as those of the other arguments.
    """
    params, _ = energy.normalise(sharding.gather(ema, mesh), vectors)
    return sharding.gather(params, mesh)


def _load_exported(file: epath.Path) -> Run:
    """Loads the model in an exported file.

    Raises:
      UserError: if the file cannot be read.
    """
    config, step, params = exported.read(file)
    replicated = sharding.replicated(sharding.make_mesh())
    return _run(config, sharding.place(params, replicated), step)


def _run(config: ConfigDict, params: Params, step: int) -> Run:
    """Returns the run with the sampler of its configuration, on all devices."""
    generation = method.for_generation(method.from_config(config), config)
    batch_size = config.evaluation.batch_size
    return Run(config, Model.create(generation, params, sharding.make_mesh(), batch_size), step)


def _abstract(config: ConfigDict) -> PyTree:
    """Returns the shapes and dtypes of the fields of a training state that generation needs."""
    energy = method.from_config(config).energy
    ema, vectors = jax.eval_shape(energy.init, jax.random.key(0))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return {"step": step, "ema": ema, "vectors": vectors}
