"""What the tasks share: their random keys."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import exact, tiny

from drl_jax import config as config_lib
from drl_jax.data import mixtures, sources
from drl_jax.errors import UserError
from drl_jax.metrics import levels
from drl_jax.model import Model
from drl_jax.runtime.batching import Engine
from drl_jax.sampling.ladder import Adapted
from drl_jax.storage.runs import Run
from drl_jax.tasks import (
    common,
    compose,
    evaluate,
    inpaint,
    interpolate,
    likelihood,
    long_run,
    ood,
    restore,
    sample,
    table,
)
from drl_jax.training import loop

SEED = 7


def small_config():
    """Returns a configuration with which every task takes seconds."""
    config = config_lib.load(str(tiny.DIGITS))
    fields = {
        **{name: value for name, value in tiny.CONFIG.items() if name != "energy.mult"},
        "energy.mult": (1,),
        "seed": SEED,
        "evaluation.num_samples": 9,
        "evaluation.num_data": 60,
        "likelihood.chains": 2,
        "likelihood.distributions": 6,
        "likelihood.transitions": 1,
        "likelihood.burn_in": 1,
        "likelihood.warmup_steps": 1,
    }
    config.update_from_flattened_dict(fields)
    return config


def gaussian_run(sampler="langevin"):
    """Returns a run whose model is that of independent Gaussian pixels."""
    data = mixtures.gaussian(np.zeros(64), 0.25 * np.eye(64))
    config = small_config()
    config.mcmc.sampler = sampler
    return Run(config, exact.model(data, 6, shape=(8, 8, 1)), 5)


def train(workdir):
    config = small_config()
    loop.train(config, sources.open_source(config), workdir)


def adapt(workdir):
    del workdir
    common.adapted(gaussian_run("mala"))


def estimate_likelihood(workdir, sampler="langevin"):
    with contextlib.suppress(UserError):  # the bounds are too loose
        task(likelihood, model=None, seed=SEED)(workdir, sampler)


def compose_models(workdir, sampler="langevin"):
    compose.run(
        run=gaussian_run(sampler),
        workdir=workdir,
        model=None,
        others=(),
        labels=(),
        rule="mixture",  # which needs no adaptation, whose key is that of another purpose
        weights=(),
        temperature=1.0,
        num_samples=1,
        seed=SEED,
    )


def task(module, **flags):
    return lambda workdir, sampler="langevin": module.run(
        run=gaussian_run(sampler), workdir=workdir, label=None, guidance=0.0, **flags
    )


# Everything that draws random numbers: training and, by their names in `KEY_NUMBERS`, tasks.
PURPOSES = {
    "train": train,
    "adapt": adapt,
    "sample": task(sample, num_samples=1, seed=SEED),
    "evaluate": task(evaluate, protocol="default"),
    "interpolate": task(interpolate, images=(), pairs=1, frames=3, level=1, seed=SEED),
    "inpaint": task(inpaint, mask="random:0.5", images=(), completions=2, rounds=1, seed=SEED),
    "restore": task(
        restore,
        model=None,
        operator="mask:random:0.5",
        images=(),
        observations=(),
        samples=2,
        particles=0,
        evidence_runs=0,
        seed=SEED,
    ),
    "compose": compose_models,
    "long_run": task(
        long_run, num_steps=1, num_chains=2, levels=[0], marginal=False, seed=SEED
    ),
    "likelihood": estimate_likelihood,
    "ood": task(
        ood,
        model=None,
        against=["shuffled"],
        ood_masks=None,
        false_alarm_rate=0.05,
        seed=SEED,
    ),
}


class FirstKeys:
    """Records the keys that are made from the key of a seed, and uses of that key itself."""

    def __init__(self, monkeypatch):
        self.recorded = set()
        split, fold_in = jax.random.split, jax.random.fold_in
        rng = np.random.default_rng(0)
        self.seed_key = numbers(jax.random.key(SEED))

        def recording_children(derive):
            def recording(key, *args, **kwargs):
                children = derive(key, *args, **kwargs)
                if not isinstance(key, jax.core.Tracer) and self.seed_key == numbers(key):
                    self.recorded |= {numbers(child) for child in children.reshape(-1)}
                return children

            return recording

        def draw(x):
            values = rng.normal(size=x.shape)
            return (values if jnp.issubdtype(x.dtype, jnp.floating) else 0 * values).astype(
                x.dtype
            )

        def recording_run(engine, compiled, shared, batches, size=0):
            for leaf in jax.tree.leaves(shared):
                self.use(leaf)
            for batch in batches:  # no result matters here, and compilation takes long
                shapes = jax.eval_shape(compiled, shared, batch)
                yield jax.tree.map(draw, shapes)

        def recording_adapt(model, key, *_, **__):
            self.use(key)
            return model, Adapted(*np.ones((3, model.T)))

        monkeypatch.setattr(jax.random, "split", recording_children(split))
        monkeypatch.setattr(jax.random, "fold_in", recording_children(fold_in))
        monkeypatch.setattr(Engine, "run", recording_run)
        monkeypatch.setattr(Model, "adapt", recording_adapt)

    def use(self, value):
        """Records the key of the seed if it is passed to a program, alone or among others."""
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            self.recorded |= {numbers(key) for key in value.reshape(-1)} & {self.seed_key}


def numbers(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.slow
def test_training_and_all_tasks_use_different_keys_at_equal_seeds(tmp_path, monkeypatch):
    """Fails if a task uses the key of the seed itself, or the keys that are split off it."""
    monkeypatch.setattr(loop, "fit", lambda state, context, source: state)
    first_keys = {}
    for name, run in PURPOSES.items():
        with monkeypatch.context() as patch:
            keys = FirstKeys(patch)
            run(epath.Path(tmp_path / name))
            first_keys[name] = keys.recorded
    every = [key for keys in first_keys.values() for key in keys]
    assert min(map(len, first_keys.values())) > 0, first_keys
    assert numbers(jax.random.key(SEED)) not in every
    assert len(set(every)) == len(every), first_keys


class TakenError(Exception):
    """Stops a task when it has reached what is tested."""


@pytest.mark.parametrize("name", common.KEY_NUMBERS)
def test_a_task_takes_the_key_with_its_own_name_and_the_seed(name, tmp_path, monkeypatch):
    """Fails if a task makes its key from the seed itself, or takes that of another task."""

    def take(task, seed):
        raise TakenError(task, seed)

    key = jax.random.key

    def key_of_another_seed(seed):
        assert not np.array_equal(seed, SEED)
        return key(seed)

    monkeypatch.setattr(common, "task_key", take)
    monkeypatch.setattr(jax.random, "key", key_of_another_seed)
    with pytest.raises(TakenError) as taken:
        PURPOSES[name](epath.Path(tmp_path))
    assert taken.value.args == (name, SEED)


def test_samples_and_statistics_of_levels_use_different_keys_that_are_split_off(
    tmp_path, monkeypatch
):
    """Fails if both use the same key, or one of them the key that the other is split off."""
    used = [common.task_key("evaluate", SEED)]

    def sample_batches(model, key, n, guidance):
        used.append(key)
        yield np.random.default_rng(0).normal(size=(n, *model.shape)).astype(np.float32)

    def level_statistics(model, key, x):
        used.append(key)
        raise TakenError

    monkeypatch.setattr(Model, "sample_batches", sample_batches)
    monkeypatch.setattr(levels, "level_statistics", level_statistics)
    with pytest.raises(TakenError):
        PURPOSES["evaluate"](epath.Path(tmp_path))
    assert len({numbers(key) for key in used}) == 3


@pytest.mark.parametrize(
    ("name", "sampler"), [("evaluate", "mala"), ("long_run", "hmc"), ("likelihood", "langevin")]
)
def test_tasks_whose_results_depend_on_differences_of_F_warn_of_its_resolution(
    name, sampler, tmp_path, monkeypatch
):
    """Likelihood depends on them whatever the sampler of the configuration."""

    def warn_of_rounding(of_levels, resolutions):
        assert len(of_levels) == len(resolutions) > 0
        raise TakenError

    def sample_batches(model, key, n, guidance):
        yield np.random.default_rng(0).normal(size=(n, *model.shape)).astype(np.float32)

    statistics = {"level": [0.0, 1.0], "resolution": [0.2, 0.3]}
    monkeypatch.setattr(levels, "warn_of_rounding", warn_of_rounding)
    monkeypatch.setattr(levels, "level_statistics", lambda *args: statistics)
    monkeypatch.setattr(Model, "sample_batches", sample_batches)
    adapted = Adapted(*np.ones((3, 6)))
    monkeypatch.setattr(Model, "adapt", lambda model, **settings: (model, adapted))
    with pytest.raises(TakenError):
        PURPOSES[name](epath.Path(tmp_path), sampler)


def test_the_numbers_of_the_keys_never_change():
    """Other numbers would give other samples at equal seeds."""
    old = {
        "adapt": 1,
        "sample": 2,
        "evaluate": 3,
        "interpolate": 4,
        "inpaint": 5,
        "restore": 9,
        "compose": 10,
        "long_run": 6,
        "likelihood": 7,
        "ood": 8,
    }
    assert old.items() <= common.KEY_NUMBERS.items()
    assert len(set(common.KEY_NUMBERS.values())) == len(common.KEY_NUMBERS)
    sample_key = jax.random.fold_in(jax.random.key(SEED), 2**30 + 2)
    assert numbers(common.task_key("sample", SEED)) == numbers(sample_key)


def test_every_task_that_draws_random_numbers_is_tested_above():
    no_numbers = {"export", "import_cdrl", "import_original", "plan", "prepare"}
    assert PURPOSES.keys() == {*table.TASKS, "adapt"} - no_numbers
    assert PURPOSES.keys() - {"train"} == common.KEY_NUMBERS.keys()
