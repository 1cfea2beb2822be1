import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import tiny

import drl_jax
from drl_jax import model
from drl_jax.errors import UserError
from drl_jax.metrics import frechet
from drl_jax.storage import exported


def test_an_exported_file_is_the_model_of_its_work_directory(tmp_path):
    workdir = tiny.trained(copy=tmp_path / "run")
    assert tiny.main("--mode=export", f"--workdir={workdir}") == 0
    ours, theirs = exported.read(workdir / "model.npz"), model.load_run(workdir)
    assert (ours.config, ours.step) == (theirs.config, tiny.STEPS)
    key = jax.random.key(0)
    np.testing.assert_array_equal(ours.model.sample(key, 5), theirs.model.sample(key, 5))
    loaded = drl_jax.load(str(workdir / "model.npz"))
    x, t = jnp.zeros((6, 8, 8, 1)), jnp.arange(6)
    np.testing.assert_array_equal(loaded.f(x, t), theirs.model.f(x, t))
    np.testing.assert_array_equal(drl_jax.load(str(workdir)).f(x, t), loaded.f(x, t))


def test_the_model_that_comes_with_the_package_draws_digits():
    """500 samples are about as far from the data as its own training said (0.57 of 1000).

    Turned by 180 degrees they are not digits, and much farther.
    """
    from sklearn.datasets import load_digits

    digits = frechet.fit(load_digits().data / 8 - 1)
    x = drl_jax.load("digits").sample(jax.random.key(0), 500).reshape(500, -1)
    assert frechet.frechet_distance(frechet.fit(x), digits) < 0.8
    assert frechet.frechet_distance(frechet.fit(x[:, ::-1]), digits) > 3
    for file in exported.SHIPPED.iterdir():
        assert file.stat().length <= 2_000_000


def test_a_shipped_model_takes_another_sampler_and_keeps_what_it_learned():
    """Its F, too, though that is of the b² it was trained with."""

    def revise(config):
        config.mcmc.update(K=3, b_squared=1e-3)
        return config

    ours, revised = exported.load("digits"), exported.load("digits", revise)
    assert (revised.config.mcmc.K, revised.model.method.sampler.K) == (3, 3)
    assert ours.model.method.sampler.K != 3
    step_size, before = (run.model.tuning["step_size"] for run in (revised, ours))
    assert np.all(step_size > before)
    x, t = jnp.zeros((6, 8, 8, 1)), jnp.arange(6)
    np.testing.assert_array_equal(revised.model.log_density(x, t), ours.model.log_density(x, t))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "'digit' is no work directory.*'digits'"),
        ("runs/nonesuch", "'runs/nonesuch' is no work directory"),
        ("nonesuch.npz", "no exported model nonesuch.npz"),
        (str(tiny.ROOT), "no checkpoint to read"),
    ],
)
def test_what_is_no_model_is_said_in_a_line(name, words):
    with pytest.raises(UserError, match=words) as raised:
        drl_jax.load(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no model"])
def test_a_damaged_export_is_said_in_a_line(tmp_path, damage):
    run = model.load_run(tiny.trained())
    file = epath.Path(tmp_path) / "model.npz"
    exported.write(run, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"model\.npz is no exported model, or damaged"):
        exported.read(file)


def test_arrays_that_are_no_model_are_said_in_a_line(tmp_path):
    file = epath.Path(tmp_path) / "arrays.npz"
    np.savez(file, samples=np.zeros(3))
    with pytest.raises(UserError, match=r"arrays\.npz is no exported model"):
        exported.read(file)


def test_an_export_of_another_network_is_said_in_a_line(tmp_path):
    """As one of a version whose gains were not yet part of the kernels."""
    file = tmp_path / "other.npz"
    with np.load(str(exported.SHIPPED / "digits.npz")) as arrays:
        gains = {"params/level_0_block_0/conv2/g": np.ones(16, np.float32)}
        np.savez(file, **arrays, **gains)
    with pytest.raises(UserError, match=r"other\.npz is not of this version's network"):
        exported.load(str(file))
