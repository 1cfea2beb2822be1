"""Against numbers that the authors' TensorFlow program computed from its own checkpoint."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from helpers import tiny
from helpers.fixtures import ORIGINAL, assert_close
from PIL import Image

import drl_jax
from drl_jax import config as config_lib
from drl_jax import diffusion, method, model, noise, recovery
from drl_jax.mcmc import langevin
from drl_jax.recovery import Parameterisation
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Sampler
from drl_jax.storage import tf_checkpoint

SCHEDULE = diffusion.schedule(6)
S = recovery.step_sizes(SCHEDULE, b_squared=2e-4)


@pytest.fixture(scope="module")
def expected():
    with np.load(ORIGINAL / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def network():
    """f of the authors' averaged weights, through our spectral normalisation."""
    tensors = tf_checkpoint.read(str(ORIGINAL / "ckpt"))
    config = tf_checkpoint.configure(config_lib.default(), tensors, image_size=32)
    state = tf_checkpoint.to_state(tensors, config)
    energy = method.from_config(config).energy
    params, _ = energy.normalise(state.ema, state.vectors)
    f = jax.jit(energy.f)
    return lambda x, t: f(params, x, t)


def test_schedule_and_step_sizes(expected):
    assert_close(SCHEDULE.sigma, expected["sigmas"], 1e-6)
    assert_close(SCHEDULE.a, expected["a_s"], 1e-6)
    assert_close(SCHEDULE.a_bar, expected["a_s_cum"], 1e-6)
    assert_close(SCHEDULE.sigma_bar, expected["sigmas_cum"], 1e-6)
    t = jnp.arange(6)
    assert_close(SCHEDULE.a_y(t), expected["a_s_prev"][1:], 1e-6)
    np.testing.assert_array_equal(1 - SCHEDULE.is_marginal(t), expected["is_recovery"][1:])
    assert_close(S**2, expected["step_size_square"], 1e-6)


def test_network_and_its_gradient(network, expected):
    x, t = jnp.asarray(expected["x"]), jnp.asarray(expected["t"])
    f, vjp = jax.vjp(lambda x: network(x, t), x)
    assert_close(f, expected["f"], 1e-5)
    assert_close(vjp(jnp.ones(6))[0], expected["grad_f"], 1e-5)


def test_conditional_log_density_and_its_gradient(network, expected):
    x_tilde, t = jnp.asarray(expected["x_noisy"]), jnp.asarray(expected["t"])

    def log_p(y):
        F = recovery.log_density(network, Parameterisation(S**2, 0.0))
        return recovery.conditional_log_density(F, y, x_tilde, t, SCHEDULE)

    value, vjp = jax.vjp(log_p, jnp.asarray(expected["x"]))
    assert_close(value, expected["log_p"], 1e-5)
    assert_close(vjp(jnp.ones(6))[0], expected["grad_log_p"], 1e-5)


def test_three_noiseless_langevin_steps(network, expected):
    x_tilde, t = jnp.asarray(expected["x_noisy"]), jnp.asarray(expected["t"])
    keys = jax.random.split(jax.random.key(0), 6)
    tuning = {"step_size": S, "noise_scale": jnp.zeros(6)}
    y, _ = ladder.sample_conditional(
        keys,
        recovery.log_density(network, Parameterisation(S**2, 0.0)),
        x_tilde,
        t,
        SCHEDULE,
        Sampler(langevin.init, langevin.kernel, tuning, K=3),
    )
    x = y / noise.per_example(SCHEDULE.a_y(t), y)
    assert_close(x, expected["langevin3_noiseless"], 1e-5)


def test_loss(network, expected):
    x_pos, t = jnp.asarray(expected["x_pos"]), jnp.asarray(expected["t"])
    a = noise.per_example(SCHEDULE.a_y(t), x_pos)
    phases = (a * x_pos, -1), (a * expected["x_neg"], 1)
    losses = sum(recovery.loss(network, y, sign, t, SCHEDULE)[0] for y, sign in phases)
    assert_close(jnp.mean(losses), expected["loss"], 1e-5)
    assert_close(jnp.abs(losses), expected["loss_ts"], 1e-4)


# The mode import_original


def write(prefix, tensors):
    """Writes tensors, by the names that `tf_checkpoint.read` gives them, with TensorFlow."""
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[f"{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in tensors],
        shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )


@pytest.fixture(scope="module")
def tensors():
    """Those of the fixture: its raw network equals the average and has no moments."""
    tensors = tf_checkpoint.read(str(ORIGINAL / "ckpt"))
    del tensors["_CHECKPOINTABLE_OBJECT_GRAPH"]
    return tensors


@pytest.fixture(scope="module")
def trained_tensors(tensors):
    """As they are in the middle of training: everything differs from everything else."""
    trained = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("model/"):
            trained[name] = tensor + 1
        if name.startswith("model/") and name.endswith(("/w", "/b", "/g", "dense_2/dense/W")):
            trained[f"{name}/.OPTIMIZER_SLOT/opt_c/m"] = tensor + 2
            trained[f"{name}/.OPTIMIZER_SLOT/opt_c/v"] = tensor + 3
    counters = {"i_iter_var": np.int32(5000), "opt_c/iter": np.int64(5001)}
    return trained | counters | {"opt_c/beta_1": np.float32(0.9)}


def importing(workdir, prefix, *args):
    """The arguments that import a checkpoint."""
    flags = f"--tf_checkpoint={prefix}", "--image_size=32", f"--workdir={workdir}"
    return "--mode=import_original", *flags, *args


@pytest.fixture
def workdir(tmp_path):
    """Not made yet."""
    return epath.Path(tmp_path) / "run"


def test_an_imported_checkpoint_is_the_authors_network(workdir, expected, caplog):
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt")) == 0
    f = drl_jax.load(workdir).f(expected["x"], expected["t"])
    assert_close(f, expected["f"], 1e-5)
    config = config_lib.default()
    config.energy.ch, config.energy.N = 16, 2
    assert model.load_run(workdir).config == config
    assert "no moments of Adam" in caplog.text
    assert "step 0 " in caplog.text


def test_an_import_has_its_settings_from_the_command_line(workdir):
    args = f"--config={tiny.ROOT}/configs/celeba64.py", "--config.optim.ema_decay=0.5"
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt", *args)) == 0
    config = model.load_run(workdir).config
    assert (config.data.name, config.data.image_size) == ("celeb_a", 32)
    assert (config.optim.beta1, config.optim.ema_decay) == (0.5, 0.5)
    assert (config.energy.ch, config.energy.mult, config.energy.N) == (16, (1, 2, 2, 2), 2)


def test_a_whole_training_state_is_imported(tensors, trained_tensors):
    config = tf_checkpoint.configure(config_lib.default(), trained_tensors, image_size=32)
    state = tf_checkpoint.to_state(trained_tensors, config)
    assert (int(state.step), state.step.dtype) == (5000, "int32")
    adam, schedule = state.opt_state
    assert int(adam.count) == int(schedule.count) == 5001
    abstract = model.abstract_state(config)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for ours, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
    ema = traverse_util.flatten_dict(state.ema, sep="/")
    shifted = {0: state.ema, 1: state.params, 2: adam.mu, 3: adam.nu}
    for shift, tree in shifted.items():
        for path, value in traverse_util.flatten_dict(tree, sep="/").items():
            np.testing.assert_array_equal(value, np.asarray(ema[path]) + np.float32(shift))
    np.testing.assert_array_equal(
        state.vectors["level_2_block_1/conv2/kernel"],
        tensors["model_ema/net/res_levels/2/1/conv2d_2/conv/sn_u"][0],
    )


def test_the_average_stands_for_a_raw_network_that_is_not_there(tensors, caplog):
    average = {name: t for name, t in tensors.items() if name.startswith("model_ema/")}
    config = tf_checkpoint.configure(config_lib.default(), average, image_size=32)
    with caplog.at_level("INFO"):
        state = tf_checkpoint.to_state(average, config)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert "no raw parameters" in caplog.text


def test_an_imported_model_samples_is_measured_and_trains_on(workdir, tmp_path, caplog):
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
    network = "--config.energy.ch=16", "--config.energy.N=2"
    steps = f"--workdir={workdir}", "--config.train.num_steps=2"
    assert tiny.main(config, *network, *changes, *steps) == 0
    assert "going on from step 0 of 2" in caplog.text
    assert model.load_run(workdir).step == 2


@pytest.fixture
def refused(workdir, capsys):
    """Returns a function that imports a checkpoint, which must fail and leave no trace."""

    def run(prefix):
        assert tiny.main(*importing(workdir, prefix)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: .*\n", err), err  # '.' is no newline
        assert not workdir.exists()
        return err

    return run


def drop(start):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(start)}


def add(name, shape=()):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            drop("model_ema/net/temb_dense_2/dense/b"),
            "lacks model_ema/net/temb_dense_2/dense/b:",
        ),
        (drop("model_ema/net/conv2d_in/conv/sn_u"), "lacks model_ema/net/conv2d_in/conv/sn_u:"),
        (drop("model_ema/net/res_levels/1/1/"), "lacks .*/1/1/conv2d_1/.* and 6 more"),
        (drop("model_ema/net/res_levels/1/"), "lacks .*/res_levels/1/.* and 15 more"),
        (drop("model_ema/net/res_levels/"), "no averaged network"),
        (drop("model_ema/net/conv2d_in/"), "no averaged network"),
        (drop("model_ema/"), "no averaged network"),
        (drop("model/net/res_levels/0/0/dense/dense/w"), "lacks model/net/.*/dense/dense/w:"),
        (drop("opt_c/iter"), "lacks opt_c/iter"),
        (
            drop("model/net/conv2d_in/conv/w/.OPTIMIZER_SLOT/opt_c/v"),
            "lacks .*conv/w/.*opt_c/v:",
        ),
        (add("model_ema/net/attn_s/16/0/q/W"), "holds model_ema/net/attn_s/16/0/q/W,"),
        (add("model/net/fc_out/dense/b"), "holds model/net/fc_out/dense/b,"),
        (add("model/more"), "holds model/more,"),
        (
            add("model_ema/net/temb_dense_0/dense/w", (64, 16)),
            r"temb_dense_0/dense/w is \[64, 16\], not \[16, 64\]",
        ),
        (
            add("model_ema/net/res_levels/0/0/conv2d_1/conv/w", (3, 3, 15, 16)),
            r"res_levels/0/0/conv2d_1/conv/w is \[3, 3, 15, 16\]",
        ),
        (add("model_ema/net/res_levels/3/1/conv2d_1/conv/w", (3, 3, 32, 8)), "energy.mult is"),
        (add("i_iter_var", (2,)), r"i_iter_var is \[2\]"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(
    trained_tensors, refused, tmp_path, change, words
):
    write(tmp_path / "ckpt", change(trained_tensors))
    assert re.search(words, refused(tmp_path / "ckpt"))


def test_what_is_not_imported_from_outside_the_networks_is_named(
    trained_tensors, workdir, tmp_path, caplog
):
    write(tmp_path / "ckpt", add("critic/w")(trained_tensors))
    assert tiny.main(*importing(workdir, tmp_path / "ckpt")) == 0
    assert "not imported: critic/w" in caplog.messages
    assert model.load_run(workdir).step == 5000


@pytest.mark.parametrize("kind", ["absent", "text", "folder", "no data", "cut", "flipped"])
def test_a_checkpoint_that_is_none_is_refused_in_one_line(refused, tmp_path, kind):
    prefix = tmp_path / "ckpt"
    index, content = (tmp_path / f"ckpt.{end}" for end in ("index", "data-00000-of-00001"))
    if kind == "text":
        prefix.write_text("no checkpoint")
    if kind == "folder":
        prefix.mkdir()
    if kind in ("no data", "cut", "flipped"):
        shutil.copyfile(ORIGINAL / index.name, index)
    if kind in ("cut", "flipped"):
        whole = bytearray((ORIGINAL / content.name).read_bytes())
        whole[len(whole) // 2] ^= 1
        content.write_bytes(whole[: len(whole) // 2] if kind == "cut" else whole)
    assert f"--tf_checkpoint={prefix} cannot be read" in refused(prefix)


def test_an_import_does_not_touch_a_workdir_with_checkpoints(workdir, capsys):
    def tree():
        paths = pathlib.Path(workdir).rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths}

    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt")) == 0
    before = tree()
    capsys.readouterr()
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt")) == 1
    assert re.fullmatch(r"error: .*/run holds checkpoints.*\n", capsys.readouterr().err)
    assert tree() == before


def test_an_image_size_that_cannot_be_halved_is_refused(workdir, capsys):
    assert tiny.main(*importing(workdir, ORIGINAL / "ckpt"), "--image_size=36") == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: images of 36x36 cannot be halved 3 times.*\n", err)
    assert not workdir.exists()
