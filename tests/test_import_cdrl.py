"""Checkpoints of the authors' CDRL program, imported and used like any other model.

The numbers to compare with were computed by their program (`tests/README.md`). "Fails" in a
docstring names bugs that were introduced on purpose to see the test fail.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.fixtures import CDRL, CDRL_LABELS, assert_close

import drl_jax
from drl_jax import config as config_lib
from drl_jax import diffusion, recovery
from drl_jax.errors import UserError
from drl_jax.model import Model
from drl_jax.networks import guidance
from drl_jax.networks.guidance import Condition
from drl_jax.sampling import ladder
from drl_jax.storage import cdrl_checkpoint, runs
from drl_jax.tasks import import_cdrl

# Zhu et al. (2024), and their program.
CDRL_METHOD = {
    "diffusion.T": 6,
    "diffusion.schedule": "cosine",
    "energy.network": "cdrl_resnet",
    "energy.parameterisation": "step",
    "initialiser.network": "unet",
    "mcmc.start": "initialiser",
    "mcmc.sampler": "langevin",
    "mcmc.K": 15,
    "mcmc.b_squared": 4e-4,
    "mcmc.denoise": "tweedie",
    "train.objective": "recovery",
    "train.pairs": "shared",
}
FOLDERS = {"unconditional": CDRL, "conditional": CDRL_LABELS}
T = 6


def importing(workdir, folder, *args):
    """The arguments that import a checkpoint."""
    flags = f"--checkpoint={folder / 'best.pth.tar'}", "--image_size=32"
    return "--mode=import_cdrl", *flags, f"--workdir={workdir}", *args


class Imported(NamedTuple):
    """An imported model and the numbers of the authors' program, as NHWC arrays.

    Level t of an example is its position. `x_tilde` is the noisier image and `y` the scaled
    cleaner one.
    """

    workdir: epath.Path
    model: Model
    expected: dict
    label: np.ndarray | None
    x_tilde: np.ndarray
    y: np.ndarray


@functools.cache
def imported(name, folder):
    workdir = epath.Path(folder) / name
    assert tiny.main(*importing(workdir, FOLDERS[name])) == 0
    model = drl_jax.load(str(workdir))
    with np.load(FOLDERS[name] / "expected.npz") as file:
        expected = {
            key: np.moveaxis(value, 1, -1) if value.ndim == 4 else value
            for key, value in file.items()
        }
    schedule = model.method.schedule
    a = np.asarray(schedule.y_scale(jnp.arange(T)))[:, None, None, None]
    label = expected.get("label")
    return Imported(workdir, model, expected, label, expected["x_t"], a * expected["x_s"])


@pytest.fixture(params=["unconditional", "conditional"])
def example(request, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "import_cdrl"
    return imported(request.param, folder)


def log_density(example):
    """Returns F with the labels of the examples."""
    label = None if example.label is None else jnp.asarray(example.label)
    return example.model.method.F(example.model.params, label=label)


def end_of_chain(example, F, start):
    """Returns the ends of the program's chains: 3 steps without noise."""
    method, t = example.model.method, jnp.arange(T)
    step_size = method.sampler.tuning["step_size"][:, None, None, None]

    @jax.jit
    def chain(y):
        def total(y):
            return jnp.sum(
                recovery.conditional_log_density(F, y, example.x_tilde, t, method.schedule)
            )

        for _ in range(3):
            y += step_size**2 / 2 * jax.grad(total)(y)
        return y

    return np.asarray(chain(start))


@pytest.mark.slow
def test_the_networks_are_those_of_the_authors(example):
    """Fails if labels are not passed on, or the initialiser has the level of its output."""
    levels = np.arange(T)
    model, expected = example.model, example.expected
    assert_close(model.f(example.y, levels, example.label), expected["ema_f"], 1e-5)
    proposed = model.propose(example.x_tilde, levels, example.label)
    assert_close(proposed, expected["ema_g"], 1e-5)


@pytest.mark.slow
def test_starts_chains_and_losses_are_those_of_the_authors(example):
    """The program's chain makes 3 steps without noise from g, and divides the end by a.

    Fails if the step sizes are those of another b², if the quadratic term is missing, or if the
    energy's loss has other weights.
    """
    method, expected = example.model.method, example.expected
    schedule, t = method.schedule, jnp.arange(T)
    std = schedule.y_scale(t) * diffusion.posterior_std(t, schedule)
    np.testing.assert_allclose(std, expected["start_std"], rtol=2e-4)
    start = example.model.propose(example.x_tilde, np.arange(T), example.label)
    y_K = end_of_chain(example, log_density(example), start)
    a = np.asarray(schedule.y_scale(t))[:, None, None, None]
    assert_close(y_K / a, expected["ema_chain"], 2e-5)
    moved = np.sum((y_K - np.asarray(start)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(moved, expected["ema_g_loss"], rtol=1e-4)
    terms = []
    for y, sign in ((example.y, -1.0), (y_K, 1.0)):
        f = functools.partial(example.model.f, label=example.label)
        terms.append(recovery.loss(f, jnp.asarray(y), sign, t, schedule)[0])
    np.testing.assert_allclose(sum(terms), expected["ema_loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_guidance_and_its_chain_are_those_of_the_authors(tmp_path_factory):
    """Fails if f or g is not guided, or if the quadratic term is scaled, too."""
    example = imported("conditional", tmp_path_factory.getbasetemp() / "import_cdrl")
    model, expected, levels = example.model, example.expected, jnp.arange(T)
    condition = Condition(jnp.asarray(example.label), jnp.float32(0.7))
    params = guidance.with_condition(model.params, condition)
    guided = model.with_params(params)
    assert_close(guided.f(example.y, levels), expected["ema_f_guided"], 1e-5)
    start = guided.propose(example.x_tilde, levels)
    assert_close(start, expected["ema_g_guided"], 1e-5)
    y_K = end_of_chain(example, model.method.F(params), start)
    a = np.asarray(model.method.schedule.y_scale(levels))[:, None, None, None]
    assert_close(y_K / a, expected["ema_chain_guided"], 2e-5)


@pytest.mark.slow
def test_the_final_denoising_is_that_of_the_authors_if_its_factor_is_2(example):
    """The program used the raw parameters and the cleaner image of level 0 here.

    Fails with factor 1, and with the gradient in y instead of x.
    """
    method = example.model.method
    file = FOLDERS[example.workdir.name] / "best.pth.tar"
    parts = cdrl_checkpoint.extract(cdrl_checkpoint.read(str(file)), 32)
    state = import_cdrl.to_state(parts, runs.load(example.workdir).config)
    params, _ = method.energy.normalise(state.params, state.vectors)
    example = example._replace(model=example.model.with_params(params))
    if example.label is not None:
        example = example._replace(label=example.label[:1])
    conditionals = method.conditionals(params)._replace(F=log_density(example))
    x_0 = jnp.asarray(example.expected["x_s"][:1])
    found = jax.jit(lambda x: ladder.denoised(conditionals, x, 2.0))(x_0)
    assert_close(found, example.expected["denoised"], 1e-5)


@pytest.mark.slow
def test_an_imported_model_has_the_settings_of_cdrl_and_samples(example):
    config = runs.load(example.workdir).config
    fields = dict(config_lib.flatten(config))
    assert {name: fields[name] for name in import_cdrl.METHOD} == CDRL_METHOD
    classes = 0 if example.label is None else 4
    assert (config.data.classes, config.initialiser.ch) == (classes, 32)
    model = example.model.with_sampler("langevin", K=1)
    samples = model.sample(jax.random.key(0), 2)
    assert samples.shape == (2, 32, 32, 3)
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("name", ["digits_density", "toy2d", "cifar10_t1k", "cifar10_cdrl"])
def test_the_settings_of_the_method_do_not_depend_on_the_configuration(name):
    """Only those of data, optimiser and the like do."""
    parts = cdrl_checkpoint.extract(cdrl_checkpoint.read(str(CDRL / "best.pth.tar")), 32)
    config = config_lib.load(name)
    config.data.dequantise = 0.0
    found, expected = (
        dict(config_lib.flatten(import_cdrl.configure(c, parts, 32)))
        for c in (config, config_lib.default())
    )
    for field, value in found.items():
        if field.split(".")[0] in import_cdrl.SECTIONS:
            assert value == expected[field], field
    assert found["data.name"] == config.data.name


@pytest.mark.slow
def test_labels_that_do_not_exist_are_errors(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "import_cdrl"
    model = imported("conditional", folder).model
    x, t = np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, int)
    for label, message in (
        (np.array([1, 5]), "label 5 does not exist: give 1 to 4, or 0 for no label"),
        (np.array([1, -1]), "label -1 does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            model.f(x, t, label=label)
        with pytest.raises(UserError, match=message):
            model.propose(x, t, label=label)
    none = np.zeros(2, int)
    np.testing.assert_array_equal(model.f(x, t), model.f(x, t, label=none))
    without = imported("unconditional", folder).model
    with pytest.raises(UserError, match="trained without labels: give no label"):
        without.f(x, t, label=none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--checkpoint=missing.tar"], "missing.tar cannot be read as a checkpoint"),
        (["--image_size=30"], "examples of length 30"),
        (["--config=missing"], "--config=missing: no such Python file"),
        (["--config.energy.ch=8"], "energy.ch=8: --mode=import_cdrl"),
        (["--config.mcmc.K=8"], "mcmc.K=8: --mode=import_cdrl"),
    ],
)
def test_an_import_that_fails_is_one_line_and_leaves_no_folder(
    tmp_path, capsys, changes, message
):
    workdir = tmp_path / "run"
    assert tiny.main(*importing(workdir, CDRL), *changes) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()
