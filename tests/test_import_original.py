import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from helpers import tf_checkpoints, tiny
from helpers.fixtures import ORIGINAL, assert_close
from PIL import Image

import drl_jax
from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.storage import runs, tf_checkpoint
from drl_jax.tasks import import_original
from drl_jax.training import state as train_state


def importing(workdir, prefix, *args):
    """The arguments that import a checkpoint."""
    flags = f"--tf_checkpoint={prefix}", "--image_size=32", f"--workdir={workdir}"
    return "--mode=import_original", *flags, *args


@pytest.fixture
def workdir(tmp_path):
    """A folder that does not exist yet."""
    return epath.Path(tmp_path) / "run"


@pytest.mark.slow
def test_an_imported_checkpoint_is_the_authors_network(workdir, caplog):
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt")) == 0
    with np.load(ORIGINAL / "expected.npz") as expected:
        f = drl_jax.load(str(workdir)).f(expected["x"], expected["t"])
        assert_close(f, expected["f"], 1e-5)
    config = config_lib.default()
    config.energy.ch, config.energy.N = 16, 2
    assert runs.load(workdir).config == config
    assert "no moments of Adam" in caplog.text
    assert "step 0 " in caplog.text


@pytest.mark.slow
def test_settings_of_an_import_come_from_the_command_line(workdir):
    args = f"--config={tiny.ROOT}/configs/celeba64.py", "--config.optim.ema_decay=0.5"
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt", *args)) == 0
    config = runs.load(workdir).config
    assert (config.data.name, config.data.image_size) == ("celeb_a", 32)
    assert (config.optim.beta1, config.optim.ema_decay) == (0.5, 0.5)
    assert (config.energy.ch, config.energy.mult, config.energy.N) == (16, (1, 2, 2, 2), 2)


def test_a_configuration_with_another_network_gets_that_of_the_paper():
    config = config_lib.load("cifar10_cdrl")
    config.mcmc.start = "x_tilde"
    config = tf_checkpoint.configure(config, tf_checkpoints.trained(), image_size=32)
    assert (config.energy.network, config.initialiser.network) == ("resnet", "none")
    assert method.from_config(config).initialiser is None


def to_state(tensors):
    """Returns the imported state, which has the shapes and dtypes of a new one."""
    config = tf_checkpoint.configure(config_lib.default(), tensors, image_size=32)
    state = import_original.to_state(tf_checkpoint.extract(tensors, config), config)
    energy = method.from_config(config).energy
    abstract = jax.eval_shape(
        lambda key: train_state.create(key, energy, train_state.optimiser(config)),
        jax.random.key(0),
    )
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for ours, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
    return state


def test_a_whole_training_state_is_imported():
    """Raw parameters and moments of the fixture are the average plus 1, 2 and 3."""
    state = to_state(tf_checkpoints.trained())
    assert int(state.step) == 5000
    adam, schedule = state.opt_state
    assert int(adam.count) == int(schedule.count) == 5001
    ema = traverse_util.flatten_dict(state.ema, sep="/")
    for shift, tree in enumerate((state.ema, state.params, adam.mu, adam.nu)):
        for path, value in traverse_util.flatten_dict(tree, sep="/").items():
            np.testing.assert_array_equal(value, np.asarray(ema[path]) + np.float32(shift))


@pytest.mark.slow
def test_training_continues_with_the_update_that_the_authors_program_would_make():
    """The moments are so small that epsilon, which Keras adds to sqrt(v), matters."""
    tensors = tf_checkpoints.trained()
    for name, tensor in tensors.items():
        if name.endswith(("opt_c/m", "opt_c/v")):
            tensors[name] = np.full_like(tensor, 1e-8 if name.endswith("m") else 1e-14)
    state = to_state(tensors)
    optimiser = train_state.optimiser(config_lib.default())
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 3e-7), state.params)
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
    n = 5002
    m = 0.9 * 1e-8 + 0.1 * 3e-7
    v = 0.999 * 1e-14 + 0.001 * 3e-7**2
    expected = -1e-4 * np.sqrt(1 - 0.999**n) / (1 - 0.9**n) * m / (np.sqrt(v) + 1e-7)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    assert int(opt_state[0].count) == n


@pytest.mark.slow
def test_without_moments_the_first_update_is_zero_as_in_a_new_run_of_the_authors():
    state = to_state(tf_checkpoints.untrained())
    gradient = jax.tree.map(jnp.ones_like, state.params)
    optimiser = train_state.optimiser(config_lib.default())
    updates, _ = optimiser.update(gradient, state.opt_state, state.params)
    assert not any(np.any(update) for update in jax.tree.leaves(updates))


def test_the_average_replaces_missing_raw_parameters(caplog):
    tensors = tf_checkpoints.untrained()
    average = {name: t for name, t in tensors.items() if name.startswith("model_ema/")}
    with caplog.at_level("INFO"):
        state = to_state(average)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert "no raw parameters" in caplog.text
    assert "no moments of Adam" in caplog.text
    assert all(not np.any(moment) for moment in jax.tree.leaves(state.opt_state))


@pytest.mark.slow
def test_an_imported_model_can_be_sampled_evaluated_and_trained(workdir, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i,) * 3).save(tmp_path / "images" / f"{i}.png")
    fields = {
        "data.name": f"folder:{tmp_path / 'images'}",
        "mcmc.K": 1,
        "train.batch_size": 4,
        "evaluation.num_samples": 4,
    }
    changes = [f"--config.{name}={value}" for name, value in fields.items()]
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt", *changes)) == 0
    assert tiny.main("--mode=sample", f"--workdir={workdir}", "--num_samples=2") == 0
    assert len(list((workdir / "samples" / "step_0_seed_0").glob("0*.png"))) == 2
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}") == 0
    config = f"--config={tiny.ROOT}/configs/cifar10.py"
    network = [f"--config.energy.{field}" for field in ("ch=16", "N=2", "dtype=float32")]
    steps = f"--workdir={workdir}", "--config.train.num_steps=2"
    caplog.clear()
    assert tiny.main(config, *network, *changes, *steps) == 0
    assert "step 0 of 2" in caplog.text  # where training resumes
    assert runs.load(workdir).step == 2


def test_an_import_that_fails_is_one_line_and_leaves_no_folder(workdir, tmp_path, capsys):
    tensors = tf_checkpoints.trained()
    del tensors["opt_c/iter"]
    tf_checkpoints.write(tmp_path / "ckpt", tensors)
    failures = {
        tmp_path / "ckpt": "lacks opt_c/iter",
        tmp_path / "nonesuch": "tf_checkpoint=.*nonesuch cannot be read",
    }
    for prefix, words in failures.items():
        assert tiny.main(*importing(workdir, prefix)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(rf"error: .*{words}.*\n", err), err  # '.' does not match newlines
        assert not workdir.exists()


def test_tensors_outside_the_networks_do_not_prevent_an_import(workdir, tmp_path, caplog):
    critic = {"critic/w": np.zeros((), np.float32)}
    tf_checkpoints.write(tmp_path / "ckpt", tf_checkpoints.trained() | critic)
    assert tiny.main(*importing(workdir, tmp_path / "ckpt")) == 0
    assert "not imported: critic/w" in caplog.messages
    assert runs.load(workdir).step == 5000


def test_an_import_does_not_touch_a_workdir_with_checkpoints(workdir, capsys):
    def tree():
        paths = pathlib.Path(workdir).rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths}

    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt")) == 0
    before = tree()
    capsys.readouterr()
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt")) == 1
    assert re.fullmatch(r"error: .*/run .*checkpoints.*--workdir\n", capsys.readouterr().err)
    assert tree() == before


def test_an_image_size_that_cannot_be_halved_is_rejected(workdir, capsys):
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt"), "--image_size=36") == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: .*length 36 .*\n", err)
    assert not workdir.exists()
