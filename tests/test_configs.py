"""Tests that every file in configs/ is valid, documented, and has the paper's settings."""

import ast
import functools
import pathlib
import re
import tomllib

import jax
import numpy as np
import pytest

from drl_jax import config as config_lib
from drl_jax import diffusion, method
from drl_jax.errors import UserError
from drl_jax.runtime import sharding
from drl_jax.tasks import command_line
from drl_jax.training import state, step

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.py"))
README = FOLDER / "README.md"

# Gao et al. (2021): image size, blocks, batch size, beta1.
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
def test_a_config_states_result_hardware_time_and_command(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    for heading in ("Reproduces:", "Hardware:", "Time:"):
        assert f"\n{heading} " in text
    assert f"\n    python -m drl_jax.main --config=configs/{path.name} --workdir=DIR" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_states_the_number_of_steps_and_whose_choice_it_is(path):
    """For the paper's data sets, it names the sources that were searched for a number."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    (stated,) = re.findall(r"^Steps: +((?:.+\n)(?: {12}.+\n)*)", text, re.MULTILINE)
    config = config_lib.load(str(path))
    assert stated.startswith(f"{config.train.num_steps:,}, our choice")
    if path.stem in PAPER:
        for source in ("paper", "README", "1,000,000 (n_iters in its config.py)"):
            assert source in " ".join(stated.split())
        assert "steps" not in text.replace(stated, "")


def test_only_the_configs_state_how_long_the_papers_models_are_trained():
    """The default is that of the authors' program."""
    assert config_lib.default().train.num_steps == 1_000_000
    lengths = {
        config_lib.load(str(FOLDER / f"{name}.py")).train.num_steps for name in PAPER
    } | {240_000}
    written = {text for n in lengths for text in (f"{n}", f"{n:,}", f"{n:_}")}
    for file in (README, FOLDER.parent / "README.md", FOLDER.parent / "drl_jax" / "config.py"):
        assert not {text for text in written if text in file.read_text()}, file


def test_all_t1k_configs_have_the_objective_that_works_on_digits():
    digits, *others = (
        dict(config_lib.flatten(config_lib.load(str(FOLDER / f"{name}_t1k.py"))))
        for name in ("digits", "cifar10", "mnist")
    )
    assert digits["train.objective"] == "denoising"
    fields = [name for name in digits if name.startswith(("diffusion.", "mcmc."))]
    for name in (*fields, "energy.parameterisation", "train.objective", "train.levels"):
        assert [other[name] for other in others] == 2 * [digits[name]], name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("changes", [[], ["--config.train.num_steps=777"]])
def test_the_learning_rate_is_constant_or_decays_until_the_end_of_the_run(path, changes):
    """Fails if the decay has a length of its own, which longer runs would not change."""
    config = command_line.changed(config_lib.load(str(path)), changes)
    paper = not path.stem.startswith(("mnist", "toy2d", "digits", "arrays", "breast", "heart"))
    assert config.optim.decay_steps == (0 if paper else config.train.num_steps)


@pytest.mark.parametrize(
    "order", [["decay_steps", "num_steps"], ["num_steps", "decay_steps"]], ids=str
)
def test_an_explicit_decay_takes_precedence_over_the_length_of_the_run(order):
    flags = {
        "decay_steps": "--config.optim.decay_steps=3000",
        "num_steps": "--config.train.num_steps=777",
    }
    config = config_lib.load(str(FOLDER / "digits.py"))
    changed = command_line.changed(config, [flags[name] for name in order])
    assert (changed.optim.decay_steps, changed.train.num_steps) == (3000, 777)
    assert (config.optim.decay_steps, config.train.num_steps) == (5000, 5000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_papers_data_sets_are_trained_with_the_authors_adam(path):
    """The small runs keep that with which their results were measured; CDRL's have Adam."""
    ours = path.stem in ("digits_t6", "digits_t1k", "toy2d") or path.stem.endswith("_cdrl")
    assert config_lib.load(str(path)).optim.adam == ("optax" if ours else "keras")


def test_the_readme_has_a_row_for_each_config():
    rows = re.findall(r"^\| `(\w+)\.py` \|", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in CONFIGS)


def test_the_example_in_the_readme_is_a_valid_config(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    config = config_lib.load(str(tmp_path / "example.py"))
    config_lib.validate(config)
    assert method.from_config(config).energy.shape == (64, 64, 3)


def test_every_setting_in_the_readme_exists():
    fields = dict(config_lib.flatten(config_lib.default()))
    text = README.read_text()
    named = set(re.findall(r"config\.([a-z_]+\.\w+)", text))
    named |= set(re.findall(rf"`((?:{'|'.join(config_lib.default())})\.\w+)\W", text))
    assert {"data.name", "mcmc.K", "train.accumulate"} <= named
    assert named - {"data.json"} <= fields.keys()  # data.json is a file


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_step_of_each_config_keeps_the_shapes_of_its_state(path):
    config = config_lib.load(str(path))
    config_lib.validate(config)
    learned = method.from_config(config)
    assert learned.energy.shape == config_lib.example_shape(config)
    training = step.from_config(config)
    old = state.abstract(learned.energy, training.optimiser)
    train_step = functools.partial(
        step.train_step, method=learned, training=training, mesh=sharding.make_mesh()
    )
    B = config.train.batch_size
    batch = {"image": jax.ShapeDtypeStruct((B, *learned.energy.shape), "float32")}
    if config.data.classes:
        batch["label"] = jax.ShapeDtypeStruct((B,), "int32")
    new, metrics = jax.eval_shape(train_step, old, batch, jax.random.key(0))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), old, new)
    assert all(jax.tree.leaves(same))
    assert metrics.loss.shape == ()
    assert metrics.f_pos.shape == (len(diffusion.level_groups(config.diffusion.T)),)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    config = config_lib.load(str(next(path for path in CONFIGS if path.stem == name)))
    size, N, batch, beta1 = PAPER[name]
    assert (config.data.image_size, config.energy.N) == (size, N)
    assert (config.train.batch_size, config.optim.beta1) == (batch, beta1)
    # Training in bfloat16 is as good; what is measured is computed in float32.
    assert (config.energy.dtype, config.evaluation.dtype) == ("bfloat16", "float32")
    assert (config.energy.ch, config.energy.mult) == (128, MULT[size])
    assert (config.diffusion.T, config.mcmc.K, config.mcmc.b_squared) == (6, 30, 2e-4)
    assert (config.optim.learning_rate, config.optim.warmup_steps) == (1e-4, 1000)
    assert (config.optim.ema_decay, config.data.flip) == (0.999, True)


def test_the_settings_of_cdrl():
    """Zhu et al. (2024), and their program: networks, optimisers and length of training."""
    config = config_lib.load("cifar10_cdrl")
    own, optim = config.initialiser, config.optim
    assert (config.energy.ch, config.energy.mult, config.energy.N) == (128, (1, 2, 2, 2), 8)
    assert (own.ch, own.mult, own.N, own.attention) == (64, (1, 1, 1), 3, (16, 8))
    assert (own.dropout, own.groups) == (0.1, 32)
    assert (own.learning_rate, own.warmup_steps, own.first_step) == (1e-5, 10_000, 500)
    assert (optim.adam, optim.learning_rate, optim.warmup_steps) == ("optax", 1e-4, 10_000)
    assert (optim.clip_norm, optim.ema_decay) == (1.0, 0.9999)
    assert (config.train.batch_size, config.train.num_steps) == (256, 400_000)


@pytest.mark.parametrize(
    ("x", "network", "channels", "size", "dequantise"),
    [
        (np.zeros((5, 7), np.float32), "mlp", 7, 16, 0),
        (np.zeros((5, 40, 1)), "image_mlp", 1, 40, 0),
        (np.zeros((5, 2001, 2), np.uint8), "unet", 2, 2001, 0),
        (np.zeros((5, 4096, 1)), "unet", 1, 4096, 0),
        (np.zeros((5, 8, 8, 1), np.uint8), "image_mlp", 1, 8, 2 / 255),
        (np.zeros((5, 8, 8, 3), np.float32), "image_mlp", 3, 8, 0),
        (np.zeros((5, 30, 30, 3), np.uint8), "unet", 3, 30, 2 / 255),
        (np.zeros((5, 17, 17, 1)), "unet", 1, 17, 0),
        (np.zeros((5, 8, 8, 8, 2)), "image_mlp", 2, 8, 0),
        (np.zeros((5, 12, 12, 12, 1)), "unet", 1, 12, 0),
    ],
)
def test_the_config_of_arrays_follows_the_file(
    tmp_path, x, network, channels, size, dequantise
):
    np.save(tmp_path / "a.npy", x)
    flag = f"--config.data.name=npy:{tmp_path / 'a.npy'}"
    config = command_line.changed(config_lib.load("arrays"), [flag])
    assert (config.energy.network, config.data.channels) == (network, channels)
    assert (config.data.image_size, config.data.dequantise) == (size, dequantise)
    assert method.from_config(config).energy.shape == x.shape[1:]
    assert config.data.standardise == (x.ndim != 4)


def test_the_command_line_takes_precedence_over_the_file(tmp_path):
    """Resized images get the network of their new size."""
    np.save(tmp_path / "a.npy", np.zeros((5, 8, 8, 1), np.uint8))
    flags = [f"--config.data.name=npy:{tmp_path / 'a.npy'}", "--config.data.image_size=32"]
    config = command_line.changed(config_lib.load("arrays"), [*flags, "--config.energy.ch=32"])
    assert (config.energy.network, config.energy.ch, config.energy.patch) == ("unet", 32, 4)


def test_every_configuration_has_a_name():
    assert config_lib.named() == {path.stem: path for path in CONFIGS}
    with pytest.raises(UserError, match=r"--config=cifar: .*, cifar10, .*, toy2d_cdrl$"):
        config_lib.load("cifar")


def test_an_installed_package_has_its_configurations_inside(tmp_path, monkeypatch):
    """There they take precedence, because other packages can own a folder next to it."""
    inside, beside = tmp_path / "drl_jax" / "configs", tmp_path / "configs"
    for folder, name in ((inside, "mine"), (beside, "theirs")):
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text("")
    monkeypatch.setattr(config_lib, "__file__", str(tmp_path / "drl_jax" / "config.py"))
    assert config_lib.named() == {"mine": inside / "mine.py"}
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"drl_jax.configs": FOLDER.name}
    assert "drl_jax.configs" in setuptools["packages"]
