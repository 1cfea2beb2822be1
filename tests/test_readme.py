"""Runs the code in the README files, and follows their links."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.metropolis import GAUSSIAN, MEAN, VARIANCE, gaussian
from helpers.statistical import assert_mean, assert_variance

import drl_jax
from drl_jax import config as config_lib
from drl_jax import method as method_lib
from drl_jax import noise
from drl_jax.model import Model
from drl_jax.runtime import sharding
from drl_jax.sampling import ladder, masks
from drl_jax.sampling.ladder import Sampler

README = tiny.ROOT / "README.md"
ARCHITECTURE = tiny.ROOT / "drl_jax" / "README.md"
SAMPLING = tiny.ROOT / "drl_jax" / "sampling" / "README.md"
TESTS = tiny.ROOT / "tests" / "README.md"
DOCUMENTS = [
    *sorted(tiny.ROOT.glob("*.md")),
    *(
        file
        for folder in (".github", "configs", "drl_jax", "launch", "tests")
        for file in sorted((tiny.ROOT / folder).glob("**/*.md"))
    ),
]


def code_blocks(file, language):
    """Returns the contents of all code blocks of a Markdown file in one language."""
    block = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return block.findall(file.read_text())


def new_modules():
    """Returns the Python files that drl_jax/README.md adds, by path."""
    blocks = code_blocks(ARCHITECTURE, "python")
    return {re.match(r"# (drl_jax/\S+\.py)\n", code)[1]: code for code in blocks}


def changes():
    """Yields (path, old text, new text) for every change in drl_jax/README.md."""
    for diff in code_blocks(ARCHITECTURE, "diff"):
        for file in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
            header, *hunks = file.split("@@\n")
            for hunk in hunks:
                lines = hunk.splitlines(keepends=True)
                old = "".join(line[1:] for line in lines if line[0] != "+")
                new = "".join(line[1:] for line in lines if line[0] != "-")
                yield header.split()[0], old, new


def load(path, tmp_path):
    """Imports a module that drl_jax/README.md adds."""
    file = tmp_path / "module.py"
    file.write_text(new_modules()[path])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_python_example_gives_arrays_of_the_stated_shapes():
    """Runs it with 4 images instead of 64, and 2 pairs instead of 8, to save time."""
    (code,) = code_blocks(README, "python")
    code = code.replace("64", "4").replace("pairs=8", "pairs=2").replace("[8, 9,", "[2, 9,")
    variables = {}
    exec(code, variables)
    stated = re.findall(r"^(\w+) = .*# \[([\d, ]+)\]", code, re.MULTILINE)
    assert len(stated) >= 4
    for name, shape in stated:
        assert variables[name].shape == tuple(int(n) for n in shape.split(","))
        assert np.all(np.isfinite(variables[name]))


@pytest.mark.slow
def test_the_example_of_sampling_gives_the_same_samples_in_two_parts_as_in_one():
    code, *_ = code_blocks(SAMPLING, "python")
    variables = {}
    exec(code.replace("100", "4"), variables)
    whole = variables["model"].descend(
        variables["key"], variables["x_T"], top=variables["model"].T, bottom=0
    )
    np.testing.assert_array_equal(variables["x_0"], whole)


@pytest.mark.slow
def test_the_example_of_labels_runs():
    """With an untrained model in place of the one that it loads."""
    _, code, *_ = code_blocks(SAMPLING, "python")
    config = config_lib.load("digits")
    config.data.classes, config.diffusion.T = 10, 3
    method = method_lib.for_generation(method_lib.from_config(config), config)
    params, _ = method.energy.init(jax.random.key(0))
    model = Model.create(method, params, sharding.make_mesh(jax.devices()[:1]))
    images = np.zeros((2, 8, 8, 1), np.float32)
    variables = {
        "drl_jax": SimpleNamespace(load={"runs/labels": model}.get),
        "np": np,
        "key": jax.random.key(0),
        "x": images,
        "known": masks.named("left", 8, jax.random.key(0)),
        "y": images,
        "t": np.array([0, 1]),
    }
    exec(code, variables)
    assert variables["threes"].shape == (16, 8, 8, 1)
    assert variables["mixed"].shape == (3, 8, 8, 1)
    fours, mixed = variables["fours"], variables["mixed"]
    np.testing.assert_allclose(fours.sample(variables["key"], 3)[1], mixed[1], atol=1e-3)


@pytest.mark.slow
def test_the_examples_of_compositions_run():
    blocks = code_blocks(SAMPLING, "python")
    combine, sample = (
        next(block for block in blocks if word in block) for word in ("a + b", "blackjax")
    )
    variables = {"drl_jax": drl_jax, "jnp": jnp, "log_Z": np.zeros((2, 100))}
    exec(combine + sample, variables)
    x = np.zeros((1, 28, 28, 1), np.float32)
    assert (variables["a"] + variables["b"]).log_density(x, np.zeros(1, int)).shape == (1,)
    assert variables["nuts"].init(jnp.zeros((8, 8, 1))).logdensity.shape == ()


def test_the_example_of_a_statistical_test_passes():
    (code,) = code_blocks(TESTS, "python")
    variables = {}
    exec(code, variables)
    (name,) = (name for name in variables if name.startswith("test_"))
    variables[name]()


@pytest.mark.slow
def test_the_new_network_is_a_differentiable_function_of_image_level_and_parameters(tmp_path):
    cnn = load("drl_jax/networks/cnn.py", tmp_path)
    energy = cnn.energy(shape=(8, 8, 1), ch=8, N=2)
    params, vectors = energy.init(jax.random.key(0))
    assert vectors.keys() == {
        f"{layer}/kernel"
        for layer in ("conv_0", "conv_1", "conv_in", "dense_0", "dense_1", "temb")
    }
    for _ in range(100):  # until the power iteration has converged
        normalised, vectors = jax.jit(energy.normalise)(params, vectors)
    for layer in ("conv_0", "temb"):
        kernel = normalised[layer]["kernel"]
        norm = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), ord=2)
        np.testing.assert_allclose(norm, 1, rtol=1e-3)
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, 8, 8, 1)), (6, 1, 1, 1))
    f = jax.jit(energy.f)(normalised, x, jnp.arange(6))
    assert len(np.unique(f)) == 6
    gradients = jax.jit(jax.grad(lambda *args: energy.f(*args, jnp.arange(6)).sum(), (0, 1)))
    for gradient in jax.tree.leaves(gradients(normalised, x)):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient != 0)


def test_the_new_sampler_leaves_a_gaussian_invariant(tmp_path):
    """Fails if the ratio of the densities is inverted or a rejected chain moves."""
    random_walk = load("drl_jax/mcmc/random_walk.py", tmp_path)
    n, K = 100_000, 6
    sampler = Sampler(random_walk.init, random_walk.kernel, {"step_size": jnp.array([0.9])}, K)
    start = GAUSSIAN.sample(noise.example_keys(jax.random.key(9), jnp.arange(n)))
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    t, steps = jnp.zeros(n, int), jnp.arange(K)
    y, acceptance = jax.jit(
        lambda keys, y: ladder.run_chain(keys, sampler, gaussian, y, t, steps)
    )(keys, start)
    assert 0.3 < np.mean(acceptance) < 0.95
    assert_mean(y, MEAN, VARIANCE, of=2)
    assert_variance(y, MEAN, VARIANCE, of=2)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with a copy of the package to which drl_jax/README.md has been applied."""
    folder = tmp_path_factory.mktemp("extended")
    ignored = shutil.ignore_patterns("__pycache__", "*.md")
    shutil.copytree(tiny.ROOT / "drl_jax", folder / "drl_jax", ignore=ignored)
    for path, code in new_modules().items():
        assert not (folder / path).exists()
        (folder / path).write_text(code)
    for path, old, new in changes():
        text = (folder / path).read_text()
        assert text.count(old) == 1, f"{path} does not contain this once:\n{old}"
        (folder / path).write_text(text.replace(old, new))
    return folder


def run(extended, *args):
    """Runs Python on the extended package and returns what it prints."""
    command = [sys.executable, *map(str, args)]
    environment = tiny.environment() | {"XLA_FLAGS": tiny.COMPILE_FAST}
    done = subprocess.run(
        command, cwd=extended, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def save_idx(path, images):
    """Writes grey images in the format of MNIST."""
    path.write_bytes(np.array([2051, *images.shape[:3]], ">i4").tobytes() + images.tobytes())


def test_the_new_source_gives_batches_of_the_images_in_the_file(extended):
    images = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4, 1)
    save_idx(extended / "images", images)
    program = """
from drl_jax import config as config_lib
from drl_jax.data import pipeline, sources
config = config_lib.default()
config.data.name, config.data.image_size, config.train.batch_size = "idx:images", 4, 5
config.data.flip, config.data.channels = False, 1
source = sources.open_source(config)
batch = next(pipeline.training_batches(config, source))["image"]
print(batch.shape, sorted(pipeline.to_uint8(batch)[:, 0, 0, 0].tolist()))
try:
    sources.Idx("images", channels=3)
except sources.UserError as error:
    print(error)
"""
    shape, wrong_channels = run(extended, "-c", program).splitlines()[-2:]
    assert shape == f"(5, 4, 4, 1) {images[:, 0, 0, 0].tolist()}"
    assert "1 channel," in wrong_channels


def test_the_new_task_is_found_and_explained(extended):
    text = run(extended, "-m", "drl_jax.main", "--mode=vary", "--help")
    assert "--mode=vary: Draws variations" in text
    assert "--noise_level=N" in text
    program = """
import importlib, inspect
from drl_jax.tasks import table
task = table.TASKS["vary"]
parameters = inspect.signature(importlib.import_module("drl_jax.tasks.vary").run).parameters
assert parameters.keys() == {"run", "workdir", *task.arguments}
"""
    run(extended, "-c", program)


@pytest.mark.slow
def test_all_additions_work_together(extended):
    """Trains the new network on the new source with the new sampler; runs the new task."""
    rng = np.random.default_rng(0)
    save_idx(extended / "noise", rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    changes = {
        "data__name": "idx:noise",
        "energy__network": "cnn",
        "mcmc__sampler": "random_walk",
        "mcmc__warmup_steps": 5,
        "train__num_steps": 2,
        "evaluation__num_data": 20,
    }
    main = ("-m", "drl_jax.main")
    run(extended, *main, *tiny.training("workdir", **changes))
    text = run(extended, *main, "--mode=vary", "--workdir=workdir", "--noise_level=2")
    assert "random_walk step sizes after the warm-up" in text
    (folder,) = (extended / "workdir" / "variations").iterdir()
    assert (folder / "grid.png").stat().st_size > 100


def test_the_table_of_layers_is_the_tested_one_and_lists_all_modules():
    source = ast.parse((tiny.ROOT / "tests" / "test_layers.py").read_text())
    (layers,) = (
        ast.literal_eval(statement.value)
        for statement in source.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "LAYERS"
    )
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    listed = {(int(n), name) for n, cell in rows for name in re.findall(r"`(.*?)`", cell)}
    units = {(number, name.partition("/")[0]) for number, name in listed}
    assert units == {(i, unit) for i, units in enumerate(layers, 1) for unit in units}
    names = {name.removesuffix("/") for _, name in listed}
    package = tiny.ROOT / "drl_jax"
    modules = {path.relative_to(package).with_suffix("") for path in package.glob("**/*.py")}
    for module in modules:
        covered = {str(module), *map(str, module.parents)} & names
        assert covered or module.name == "__init__", f"{module} is not in the table"
    for name in names:
        assert (package / name).is_dir() or (package / f"{name}.py").is_file()


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(tiny.ROOT)))
def test_relative_links_lead_to_files_and_headings(file):
    for target in re.findall(r"\]\(([^)]+)\)", file.read_text()):
        path, _, heading = target.partition("#")
        if ":" in path:  # an address
            continue
        linked = file.parent / path if path else file
        assert linked.exists(), target
        if heading:
            assert heading in headings(linked), target


def headings(file):
    """Returns the names by which links refer to the headings of a Markdown file."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
