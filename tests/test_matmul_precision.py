"""The precision of products: read from programs that are lowered for accelerators."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.tree_util import Partial

from drl_jax import config as config_lib
from drl_jax import diffusion, recovery
from drl_jax import method as method_lib
from drl_jax.mcmc import hmc
from drl_jax.method import Method
from drl_jax.metrics import density, inception, levels, ood
from drl_jax.model import Model, Programs
from drl_jax.networks.energy import Energy
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling import chains, masks
from drl_jax.sampling.ladder import Sampler
from drl_jax.storage import runs
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

B, T = 4, 6
X = np.zeros((B, 8, 8, 1), np.float32)
LEVEL = np.zeros(B, np.int32)
KEY = jax.random.key(0)
ACCELERATORS = ("tpu", "cuda")


def config_of(**changes):
    """Returns a configuration whose convolutions are wide enough for Winograd's algorithm."""
    config = config_lib.load(str(tiny.DIGITS))
    fields = {"energy.ch": 32, "energy.mult": (1, 2), "mcmc.sampler": "hmc"}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(fields | changes)
    config_lib.validate(config)
    return config


def precisions(traced, platforms=ACCELERATORS):
    """Returns the precisions of all matrix products and convolutions of a traced program."""
    found = set()
    for platform in platforms:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = re.findall(r"stablehlo\.(?:dot_general|convolution\().*", text)
        assert products
        for product in products:
            found |= set(re.findall(r"\b(?:DEFAULT|HIGH|HIGHEST)\b", product)) or {"none"}
    return found


@pytest.fixture(scope="module")
def model():
    fields = {"network": "mlp", "ch": 8, "N": 1}
    config = config_of(
        mcmc__start="initialiser", energy__network="cdrl_resnet", data__classes=3
    )
    config.initialiser.update(fields)
    method = method_lib.from_config(config)
    energy = method.energy
    params = jax.eval_shape(lambda key: energy.normalise(*energy.init(key))[0], KEY)
    return Model.create(method, params, sharding.make_mesh(), B)


def arguments_of(model, name):
    """Returns arguments of one of the programs of a model."""
    known = np.broadcast_to(masks.named("left", 8, KEY), (B, 8, 8, 1))
    trace = np.zeros((B, 4, chains.SCALARS), np.float32)
    if name in ("f", "F", "propose"):
        return model.params, X, LEVEL
    if name == "classify":
        return model.params, X, LEVEL, np.zeros(model.classes)
    arrays, settings = {
        "generate": ((), {}),
        "descend": ((X,), {"top": T, "bottom": 0}),
        "complete": ((X,), {"top": T}),
        "inpaint": ((X, known), {"rounds": 2}),
        "start_chains": ((X, LEVEL, trace), {}),
        "advance_chains": ((X, LEVEL), {"first": 0, "last": 3}),
        "smc": (
            (),
            {
                "problems": np.arange(1),
                "problem_keys": jax.random.split(KEY, 1),
                "log_likelihood": Partial(lambda x: -jnp.sum(x**2, axis=(1, 2, 3))),
                "bridges": 2,
                **dict.fromkeys(("width", "variance", "strength", "correction"), 1.0),
            },
        ),
    }[name]
    if name == "advance_chains":
        start = model.programs.start_chains
        arrays = (jax.eval_shape(start, *arguments_of(model, "start_chains")), *arrays)
    return model.arguments(KEY, np.arange(B), *arrays, **settings)


@pytest.mark.parametrize("name", Programs._fields)
def test_all_programs_of_a_model_multiply_in_float32(model, name):
    """The sampler is HMC, so they include the gradient in x. Fails without `full_precision`."""
    program = getattr(model.programs, name)
    assert precisions(program.trace(*arguments_of(model, name))) == {"HIGHEST"}


@pytest.mark.slow
def test_the_inception_network_multiplies_in_float32(model):
    variables = jax.tree.map(
        lambda v: np.zeros(v.shape, v.dtype), inception.abstract_variables()
    )
    compiled = inception.Extractor(variables, model.engine)._compiled
    images = np.zeros((B, 8, 8, 3), np.uint8)
    assert precisions(compiled.trace(variables, images)) == {"HIGHEST"}


def test_parameters_are_normalised_in_float32(model):
    energy = model.method.energy
    params, vectors = jax.eval_shape(energy.init, KEY)
    traced = runs.generation_params.trace(energy, params, vectors, model.mesh)
    assert precisions(traced) == {"HIGHEST"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("objective", ["recovery", "denoising"])
def test_training_multiplies_in_the_configured_precision(objective, precision):
    """Includes the gradients in the kernels and, on CPUs, Winograd's algorithm.

    Fails if the precision is set outside the traced function, and if `_correlate` or
    `winograd.conv3x3` states another one (tried).
    """
    config = config_of(
        diffusion__T=1000, train__objective=objective, train__matmul_precision=precision
    )
    method, training = method_lib.from_config(config), train_step.from_config(config)
    state = train_state.abstract(method.energy, training.optimiser)
    step = train_step.compile_step(sharding.make_mesh(), method, training)
    found = precisions(step.trace(state, {"image": X}, KEY), platforms=(*ACCELERATORS, "cpu"))
    assert found == {precision.upper()}


class Recorder:
    """A model that records the default precision wherever its network is traced."""

    def __init__(self):
        self.seen = set()
        energy = Energy(None, None, self._f, X.shape[1:])
        sampler = Sampler(
            hmc.init,
            hmc.kernel,
            {"step_size": jnp.full(T, 0.1), "leapfrog": jnp.ones(T, jnp.int32)},
            1,
        )
        parameterisation = Parameterisation(jnp.ones(T), recovery.white_noise)
        method = Method(energy, diffusion.schedule(T), parameterisation, sampler)
        self.model = Model.create(method, {}, sharding.make_mesh(), B)

    def _f(self, params, x, t):
        del params
        self.seen.add(jax.config.jax_default_matmul_precision)
        return 0.0 * t - jnp.sum(jnp.square(x), axis=(1, 2, 3))


BUDGET = density.DEFAULT._replace(
    chains=B, distributions=T, transitions=1, burn_in=1, warmup_steps=1
)
USES = {
    "warm-up": lambda model: model.adapt(KEY, num_steps=1, chains=B),
    "levels": lambda model: levels.level_statistics(model, KEY, X),
    "out-of-distribution": lambda model: ood.Scorer(model)(KEY, X),
    "annealing": lambda model: density.begin(model, KEY, X, BUDGET),
}


@pytest.mark.parametrize("use", USES)
def test_what_else_evaluates_a_model_multiplies_in_float32(use):
    recorder = Recorder()
    USES[use](recorder.model)
    assert recorder.seen == {"highest"}
