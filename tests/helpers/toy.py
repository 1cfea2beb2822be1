"""Small runs of configs/toy2d.py, with fewer levels: points in the plane."""

import pytest
from etils import epath

from drl_jax import config as config_lib
from helpers import tiny

TOY = tiny.ROOT / "configs" / "toy2d.py"

SMALL = {
    "data.name": "ellipse",
    "diffusion.T": 100,
    "diffusion.schedule": "cosine",
    "energy.ch": 8,
    "energy.N": 1,
    "train.batch_size": 16,
    "train.num_steps": 30,
    "log.sample_every_steps": 20,
    "evaluation.num_samples": 100,
    "evaluation.batch_size": 100,
}


def training(workdir, **changes):
    """Returns the arguments that train in a work directory, as `tiny.training` does."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    fields = (f"--config.{name}={value}" for name, value in (SMALL | changes).items())
    return [f"--config={TOY}", f"--workdir={workdir}", *fields]


def toy(**changes):
    """Returns the configuration of configs/toy2d.py with changes."""
    config = config_lib.load(str(TOY))
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@pytest.fixture(scope="session")
def trained_toy(tmp_path_factory):
    """Returns the work directory of a run of a few steps, which tests must not change."""
    workdir = epath.Path(tmp_path_factory.mktemp("toy") / "run")
    assert tiny.main(*training(workdir)) == 0
    return workdir
