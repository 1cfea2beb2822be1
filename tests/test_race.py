"""Models that train for the same time: the diffusion model among them, and the race itself.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_mean, assert_variance
from helpers.tiny import ROOT

from drl_jax import config as config_lib
from drl_jax import diffusion, noise, recovery
from drl_jax.errors import DivergenceError
from drl_jax.mcmc import langevin
from drl_jax.model import Model
from drl_jax.networks import image_mlp
from drl_jax.networks.energy import inner_product
from drl_jax.networks.image_mlp import ImageMLP
from drl_jax.recovery import Parameterisation, no_reference
from drl_jax.runtime import sharding
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.tools import race

B, T, SHAPE = 12, 6, (4, 4, 1)
SCHEDULE = diffusion.schedule(T, "cosine")
NETWORK = ImageMLP(width=32, depth=2)
STEPS = 200  # of training
MEAN, VARIANCE = 0.4, 0.25  # of a pixel, where the data are normal


@pytest.fixture(scope="module")
def examples():
    """Random y, noise and levels."""
    rng = np.random.default_rng(0)
    y, eps = rng.normal(size=(2, B, *SHAPE)).astype(np.float32)
    return y, eps, np.arange(B, dtype=np.int32) % T


@pytest.fixture(scope="module")
def params(examples):
    """Random parameters; U is almost zero with initial ones."""
    y, _, t = examples
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), y, SCHEDULE.conditioning[t])
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: rng.normal(scale=0.2, size=p.shape).astype(np.float32), shapes["params"]
    )


def predictor(network, shape):
    """Returns the energy and the parameterisation of the diffusion model of a network."""
    energy = race.with_gradient(network, shape, SCHEDULE.conditioning[:-1])
    return energy, race.of_noise(SCHEDULE)


def gradient(energy, parameterisation):
    """Returns a function of parameters and examples: the mean denoising loss, its gradient."""

    def loss(params, y, eps, t):
        F = recovery.log_density(functools.partial(energy.f, params), parameterisation)
        return jnp.mean(recovery.denoising_loss(F, y, eps, t, SCHEDULE))

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.slow
def test_the_diffusion_model_minimises_the_squared_error_of_its_predicted_noise(
    params, examples
):
    """Fails if the score lacks the factor of y, or the gradient flows through y only."""

    def squared_error(params, y, eps, t):
        predicted = -NETWORK.apply({"params": params}, y, SCHEDULE.conditioning[t])
        return jnp.mean(jnp.square(eps - predicted)) / 2

    loss, grads = gradient(*predictor(NETWORK, SHAPE))(params, *examples)
    expected, expected_grads = jax.jit(jax.value_and_grad(squared_error))(params, *examples)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-5),
        grads,
        expected_grads,
    )


@pytest.mark.slow
def test_a_training_step_of_the_diffusion_model_needs_no_gradient_of_a_gradient(examples):
    """It costs 3 forward passes, and the energy's at least 5. Fails without stop_gradient."""
    network = ImageMLP(width=1024, depth=1)
    energy = image_mlp.energy(
        SHAPE, network.width, network.depth, 0.0, inner_product, SCHEDULE.conditioning[:-1]
    )
    parameterisation = Parameterisation(SCHEDULE.sigma_bar[:-1], no_reference)
    params, _ = jax.eval_shape(energy.init, jax.random.key(0))
    flops, flops_of_energy = (
        gradient(*model).lower(params, *examples).compile().cost_analysis()["flops"]
        for model in (
            predictor(network, SHAPE),
            (energy, parameterisation),
        )
    )
    assert flops < 0.6 * flops_of_energy


class ExactPredictor(nn.Module):
    """-E[eps | y] at every level, for normal pixels."""

    def __call__(self, y, level, keys=None):
        t = jnp.argmin(jnp.abs(level[:, None] - SCHEDULE.conditioning[:-1]), axis=1)
        scale, a_bar, sigma_bar = (
            noise.per_example(values, y)
            for values in (SCHEDULE.y_scale(t), SCHEDULE.a_bar[t], SCHEDULE.sigma_bar[t])
        )
        variance = a_bar**2 * VARIANCE + sigma_bar**2
        return -sigma_bar * (y / scale - a_bar * MEAN) / variance


def test_draws_of_the_diffusion_model_have_the_moments_of_ancestral_sampling():
    """Fails if the score is that of y and not of x_t, or with the noise of another level.

    With the exact noise, every draw is a linear function of the one above, plus noise
    (Ho et al. 2020, algorithm 2), so its moments follow from those of white noise.
    """
    a_bar, sigma_bar = np.float64(SCHEDULE.a_bar), np.float64(SCHEDULE.sigma_bar)
    mean, variance = 0.0, 1.0
    for t in reversed(range(T - 1)):
        above = a_bar[t + 1] ** 2 * VARIANCE + sigma_bar[t + 1] ** 2
        # E[x | x_{t+1}] = MEAN + gain (x_{t+1} - a_bar MEAN)
        gain = a_bar[t + 1] * VARIANCE / above
        a = a_bar[t + 1] / a_bar[t]
        of_data = a_bar[t] * (1 - a**2) / sigma_bar[t + 1] ** 2
        of_next = a * sigma_bar[t] ** 2 / sigma_bar[t + 1] ** 2
        slope = of_data * gain + of_next
        mean = of_data * (1 - gain * a_bar[t + 1]) * MEAN + slope * mean
        noise_variance = (1 - a**2) * sigma_bar[t] ** 2 / sigma_bar[t + 1] ** 2
        variance = slope**2 * variance + noise_variance
    energy, parameterisation = predictor(ExactPredictor(), (2,))
    F = recovery.log_density(functools.partial(energy.f, {}), parameterisation)
    tuning = {"step_size": jnp.ones(T)}
    sampler = Sampler(langevin.init, langevin.kernel, tuning, 0, ladder.STARTS["posterior"])
    keys = noise.example_keys(jax.random.key(0), jnp.arange(100_000))
    draw = jax.jit(lambda keys: ladder.generate(keys, Conditionals(F, SCHEDULE, sampler), (2,)))
    x = draw(keys)
    assert_mean(x, mean, variance, of=2)
    assert_variance(x, mean, variance, of=2)


def test_all_models_train_on_the_same_images_and_none_on_the_test_images(monkeypatch):
    monkeypatch.chdir(ROOT)
    for data, (size, width) in race.DATA.items():
        configs = {name: race.configuration(name, data, seed=3) for name in race.CONFIGS}
        for config in configs.values():
            assert config.data.name == data
            assert config.data.image_size == size
            assert config.data.test_fraction == race.TEST_FRACTION
            assert config.data.dequantise in (0, width)
            assert config.seed == 3
        assert configs["diffusion"] == configs["score"] == configs["t100"]


UNET = " energy.network=unet energy.ch=32 energy.mult=(1,2) energy.N=2"


@pytest.mark.parametrize("variant", ["", UNET])
def test_models_without_an_energy_have_the_network_of_the_one_with_an_energy(
    variant, monkeypatch
):
    """Only that of the plain diffusion model lacks the reference density."""
    monkeypatch.chdir(ROOT)
    config = race.configuration("diffusion" + variant, "digits", 0)
    methods = {name: race.make_method(name, config) for name in ("t100", "diffusion", "score")}
    shapes = [jax.eval_shape(m.energy.init, jax.random.key(0)) for m in methods.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    references = [m.parameterisation.reference is no_reference for m in methods.values()]
    assert references == [False, True, False]


class FakeTrainer:
    """A model whose training steps take half a second each."""

    def __init__(self, config, method, mesh, x):
        self.config, self.seconds, self.steps = config, 0.0, 0

    def advance(self):
        self.seconds += 0.5
        self.steps += 1

    def averaged(self):
        return {"kernel": np.zeros((3, 4))}


def test_the_learning_rate_reaches_zero_at_the_end_of_the_time(monkeypatch):
    made = []

    def make(*args):
        made.append(FakeTrainer(*args))
        return made[-1]

    monkeypatch.setattr(race, "Trainer", make)
    config = config_lib.load(str(ROOT / "configs" / "digits.py"))
    method, x = race.make_method("t100", config), np.zeros((1, 8, 8, 1))
    trained = race.train(config, method, sharding.make_mesh(), x, [10.2, 1000.0])
    assert [(t.seconds, t.steps) for t in trained] == [(10.5, 21), (1000, 2000)]
    rehearsal, final = made
    assert rehearsal.steps == race.SPEED_STEPS
    assert final.config.optim.decay_steps == 2000


class FakeModel:
    """A model whose samples are black; those of longer chains are grey."""

    def __init__(self, value=-1.0):
        self.value = value

    @classmethod
    def create(cls, method, params, mesh, batch_size):
        return cls()

    def with_params(self, params):
        return self

    def with_sampler(self, name, K):
        return FakeModel({"langevin": 0, "mala": 0.25}[name] + K / 1000)

    def sample(self, key, n):
        return np.full((n, 8, 8, 1), self.value, np.float32)


@pytest.fixture
def fakes(monkeypatch):
    """Replaces what takes time: models, and their judge, who likes white images."""

    class Judge(race.Judge):
        def __call__(self, samples):
            fields = ("features", "confident", "pixels", "nearest")
            return dict.fromkeys(fields, float(samples.mean()))

    white = np.ones((3, 8, 8, 1), np.float32)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(race, "Trainer", FakeTrainer)
    monkeypatch.setattr(race, "Model", FakeModel)
    monkeypatch.setattr(race, "open_judge", lambda config, workdir: Judge(None, white, white))


def test_all_models_train_for_the_same_time_and_finished_ones_are_kept(
    fakes, tmp_path, monkeypatch, capsys
):
    """The first run is stopped after three evaluations.

    Fails if results are written only at the end, if those of an unfinished model are kept, or
    if a model is evaluated before its time.
    """
    arguments = ["race", "--seconds=16", f"--workdir={tmp_path}"]
    figures = []

    def rows():
        return json.loads((tmp_path / "race.json").read_text())["rows"]

    def stop_after_three(path, panels):
        if len(rows()) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(race.figures, "write_curves", stop_after_three)
    assert race.main([*arguments, "--racers=diffusion"]) == 130
    assert [row["model"] for row in rows()] == [race.TEST, *["diffusion"] * 3]
    monkeypatch.setattr(
        race.figures, "write_curves", lambda path, panels: figures.append(panels)
    )
    assert race.main([*arguments, "--racers=t6,diffusion"]) == 0
    finished = rows()
    assert [row["model"] for row in finished] == [race.TEST, *["t6"] * 5, *["diffusion"] * 5]
    assert [row["seconds"] for row in finished[1:]] == [1, 2, 4, 8, 16] * 2
    assert [row["steps"] for row in finished[1:]] == [2, 4, 8, 16, 32] * 2
    assert [row["features"] for row in finished] == [1, *[-1] * 10]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == [name for name, _ in race.COLUMNS]
    assert [line.split()[2] for line in table[2:]] == ["1.0", "2.0", "4.0", "8.0", "16.0"] * 2
    first, last = figures[0][0], figures[-1][0]
    assert first.x == last.x == [1, 2, 4, 8, 16]
    np.testing.assert_equal(first.curves["t6"], [-1, *[np.nan] * 4])
    assert last.curves == {race.TEST: [1] * 5, "t6": [-1] * 5, "diffusion": [-1] * 5}
    monkeypatch.setattr(race, "Trainer", None)  # nothing is trained again
    assert race.main([*arguments, "--racers=diffusion"]) == 0
    assert rows() == finished
    assert race.main([*arguments, "--seed=1"]) == 1
    assert "give those, use another --workdir, or remove" in capsys.readouterr().err


def test_the_last_evaluation_of_a_model_draws_with_the_other_samplers(fakes, tmp_path, capsys):
    """Fails if all evaluations draw with them, or the columns of two samplers are exchanged."""
    variant = "t6 mcmc.K=7 diffusion.schedule=cosine energy.mult=(1,1)"
    arguments = ["--racers=", f"--variant={variant}", "--samplers=langevin:60,mala:15"]
    assert race.main(["race", "--seconds=16", f"--workdir={tmp_path}", *arguments]) == 0
    rows = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [race.TEST, *[variant] * 5]
    assert ["samplers" in row for row in rows] == [False] * 5 + [True]
    drawn = rows[-1]["samplers"]
    assert [drawn[name]["features"] for name in ("langevin:60", "mala:15")] == [
        pytest.approx(0.06),
        pytest.approx(0.265),
    ]
    *_, heading, distances = capsys.readouterr().out.splitlines()
    assert heading.split() == ["features,", "by", "sampler", "langevin:60", "mala:15"]
    assert distances.split()[-2:] == ["0.060", "0.265"]


def test_a_model_that_diverges_is_left_out_and_the_others_run(
    fakes, tmp_path, monkeypatch, capsys
):
    class Diverging(FakeTrainer):
        def advance(self):
            super().advance()
            if self.config.mcmc.K == 7 and self.steps > race.SPEED_STEPS:
                raise DivergenceError("training diverged")

    monkeypatch.setattr(race, "Trainer", Diverging)
    arguments = ["race", "--seconds=16", f"--workdir={tmp_path}", "--racers="]
    assert race.main([*arguments, "--variant=t6 mcmc.K=7", "--variant=t6 mcmc.K=8"]) == 1
    found = capsys.readouterr()
    assert found.err == "error: t6 mcmc.K=7: training diverged\n"
    assert found.out.count("t6 mcmc.K=8 ") == 5
    assert "mcmc.K=7" not in found.out
    rows = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [race.TEST, *["t6 mcmc.K=8"] * 5]


def test_results_of_earlier_versions_are_continued(fakes, tmp_path, capsys):
    """They had no other samplers."""
    assert race.main(["race", "--seconds=16", f"--workdir={tmp_path}", "--racers=t6"]) == 0
    results = json.loads((tmp_path / "race.json").read_text())
    assert results["settings"].pop("samplers") == []
    (tmp_path / "race.json").write_text(json.dumps(results))
    assert race.main(["race", "--seconds=16", f"--workdir={tmp_path}", "--racers=t100"]) == 0
    rows = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert [row["model"] for row in rows[1:]] == [*["t6"] * 5, *["t100"] * 5]


def test_a_variant_differs_from_its_model_in_the_fields_that_it_names(monkeypatch):
    monkeypatch.chdir(ROOT)
    variant = "t6 mcmc.K=7 diffusion.schedule=cosine energy.mult=(1,1) optim.ema_decay=0.5"
    fields, changed = (
        dict(config_lib.flatten(race.configuration(name, "digits", 0)))
        for name in ("t6", variant)
    )
    assert {name: value for name, value in changed.items() if value != fields[name]} == {
        "mcmc.K": 7,
        "diffusion.schedule": "cosine",
        "energy.mult": (1, 1),
        "optim.ema_decay": 0.5,
    }


@pytest.mark.slow
def test_a_model_without_an_energy_learns_a_constant_image_and_only_its_steps_are_timed(
    monkeypatch,
):
    """The clock advances by one whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(race.command, "clock", lambda: float(next(ticks)))
    config = config_lib.load(str(ROOT / "configs" / "digits.py"))
    config.data.image_size, config.data.dequantise = 2, 0.0
    config.energy.ch, config.energy.N, config.energy.dropout = 32, 1, 0.0
    config.diffusion.T, config.train.batch_size = 4, 64
    config.optim.learning_rate, config.optim.warmup_steps = 1e-2, 0
    config.optim.decay_steps, config.optim.ema_decay = STEPS, 0.9
    method, mesh = race.make_method("diffusion", config), sharding.make_mesh()
    trainer = race.Trainer(config, method, mesh, np.full((5, 2, 2, 1), 0.5, np.float32))
    for _ in range(STEPS):
        trainer.advance()
    assert (trainer.seconds, trainer.steps) == (STEPS, STEPS)
    samples = Model.create(method, trainer.averaged(), mesh, 64).sample(jax.random.key(0), 64)
    assert np.abs(samples - 0.5).mean() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds=0"], "flag --seconds=0"),
        (["--data=faces"], "value should be one of <digits|mnist5k>"),
        (
            ["--racers=t6,t7"],
            "there is no model 't7': use some of t6, t100, t1k, diffusion, score",
        ),
        (["--racers="], "there is no model to train: give some with --racers or --variant"),
        (["--variant=t6 mcmc.k=7"], "config.mcmc.k is unknown: did you mean config.mcmc.K?"),
        (["--variant=t6 mcmc.K=seven"], "mcmc.K=seven: "),
        (["--variant=t6 mcmc.K=-1"], "config.mcmc.K is -1"),
        (["--variant=t6 mcmc"], "config.mcmc is unknown"),
        (["--variant=t6 seed=3"], "seed=3: the race sets config.seed itself; leave it out"),
        (["--variant=t6 energy.parameterisation=gaussians"], "the race does not fit mixtures"),
        (["--samplers=nuts:3"], "--samplers contains 'nuts:3': give a sampler"),
        (["--samplers=mala"], "--samplers contains 'mala': give a sampler"),
        (["--racers=t6", "--samplers=mala:0"], "config.mcmc.K is 0"),
        (["--racers=score", "--samplers=mala:1"], "'score' has no energy to accept by"),
        (["digits"], "unexpected argument 'digits'"),
        (["--laps=3"], "Unknown command line flag 'laps'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert race.main(["race", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_outside_the_repository_the_error_says_where_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert race.main(["race"]) == 1
    assert "run this program from the root of the repository" in capsys.readouterr().err


def test_a_damaged_file_of_results_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "race.json").write_text("{")
    assert race.main(["race", f"--workdir={tmp_path}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path}/race.json: ")


def test_help_explains_the_columns_and_lists_the_options(capsys):
    assert race.main(["race", "--help"]) == 0
    text = capsys.readouterr().out
    for name, _ in race.COLUMNS[3:]:
        assert f"- {name}: " in text
    for name in ("racers", "variant", "samplers", "seconds", "data", "workdir", "seed"):
        assert f"--{name} " in text
