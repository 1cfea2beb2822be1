"""Every file in configs/ loads, is valid, and makes a training step of the right shapes."""

import functools
import pathlib

import jax
import pytest

from drl_jax import config as config_lib
from drl_jax import method, model
from drl_jax.runtime import sharding
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py"))

# From the paper's tables: size, blocks, batch, beta1.
PAPER = {
    "cifar10": (32, 8, 256, 0.9),
    "celeba64": (64, 6, 128, 0.5),
    "lsun_church64": (64, 2, 128, 0.9),
    "lsun_bedroom64": (64, 2, 128, 0.9),
    "lsun_church128": (128, 2, 64, 0.5),
    "lsun_bedroom128": (128, 5, 64, 0.5),
}
MULT = {32: (1, 2, 2, 2), 64: (1, 2, 2, 2, 4), 128: (1, 2, 2, 2, 4, 4)}


def test_there_is_a_config_for_each_of_the_papers_tables():
    assert set(PAPER) | {"digits", "toy2d"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_to_run_it(path):
    assert f"python -m drl_jax.main --config=configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_whole_training_step_has_the_shapes_of_its_config(path):
    config = config_lib.load(str(path))
    config_lib.validate(config)
    learned = method.from_config(config)
    size, channels = config.data.image_size, config.data.channels
    points = config.energy.network == "mlp"
    assert learned.energy.shape == ((channels,) if points else (size, size, channels))
    optimiser = train_state.optimiser(config)
    state = model.abstract_state(config)
    step = functools.partial(
        train_step.train_step,
        method=learned,
        optimiser=optimiser,
        ema_decay=config.optim.ema_decay,
        mesh=sharding.make_mesh(),
    )
    x = jax.ShapeDtypeStruct((config.train.batch_size, *learned.energy.shape), "float32")
    new_state, metrics = jax.eval_shape(step, state, x, jax.random.key(0))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new_state)
    assert all(jax.tree.leaves(same))
    assert metrics.loss.shape == ()
    assert metrics.f_pos.shape == (len(diffusion.level_groups(config.diffusion.T)),)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    config = config_lib.load(str(next(path for path in CONFIGS if path.stem == name)))
    size, N, batch, beta1 = PAPER[name]
    assert (config.data.image_size, config.energy.N) == (size, N)
    assert (config.train.batch_size, config.optim.beta1) == (batch, beta1)
    assert (config.energy.ch, config.energy.mult) == (128, MULT[size])
    assert (config.diffusion.T, config.mcmc.K, config.mcmc.b_squared) == (6, 30, 2e-4)
    assert (config.optim.learning_rate, config.optim.warmup_steps) == (1e-4, 1000)
    assert (config.optim.ema_decay, config.data.flip) == (0.999, True)
