"""Trains several models for the same time on the same data, and compares their samples.

    python -m drl_jax.tools.race [--racers=t6,t100,t1k,diffusion,score]
        [--variant="t6 energy.network=unet"]... [--samplers=langevin:15,mala:60]
        [--seconds=150] [--data=digits] [--workdir=runs/race] [--seed=0]

The models are those of three files in `configs/`, and two that are not energies:

- t6: the paper's T6, trained by recovery likelihood (digits_t6.py).
- t100: 100 levels, trained by denoising (digits.py).
- t1k: the paper's T1k, trained by denoising (digits_t1k.py).
- diffusion: a plain denoising diffusion model (Ho et al. 2020). It is t100, except that the
  output of the network, of the same size, is the predicted noise. In t100 the gradient of an
  energy takes its place, so that a training step needs the gradient of a gradient. Noise
  levels, optimiser, moving average, dropout, batches and the draws of a sample are the same.
- score: between diffusion and t100. The output of the network takes the place of the gradient
  of f, but the reference density is the same as in t100, that of uniform pixels.

Each --variant adds a model with other settings: the name of a model above, followed by
FIELD=VALUE for fields of its configuration, separated by spaces. The network of diffusion and
score is an image MLP, or, with energy.network=unet, a U-Net.

Each model trains for the given time: CPU time of this process, the sum over its threads, or
wall-clock time on accelerators. Compilation, evaluation and reading the data do not count. The
learning rate decays to zero at the end, for which a few uncounted steps show the speed.

At five times, each twice the one before, the averaged parameters draw as many samples as there
are test images. These are a fifth of the data, on which neither the models nor the classifier
are trained. The columns of the table:

- features: squared Fréchet distance to the training images, in the features of a classifier of
  the data (`metrics.classifier`).
- confident: share of samples with a class of probability above 0.9.
- pixels: squared Fréchet distance to the training images, in pixels.
- nearest: median distance of a sample to the nearest training image, divided by that of a test
  image. Values below 1 are a sign of memorisation.

With --samplers, the last evaluation also draws samples with other samplers and numbers of steps
per level, such as mala:60, and a second table shows their feature distances. The step sizes of
MALA and HMC are adapted.

A model whose training diverges is left out; the exit status is then 1.

After each evaluation, the results are written to race.json in the work directory, and the
curves to race.png. If the program is stopped, the same command runs the models that have not
finished, from their beginning; other models can be added with --racers. Run it from the root of
the repository, whose `configs/` it reads.
"""

import ast
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import method as method_lib
from drl_jax.data import pipeline, sources
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import DivergenceError, UserError
from drl_jax.method import Method
from drl_jax.metrics import classifier, pixels
from drl_jax.metrics.classifier import Classifier
from drl_jax.model import Model
from drl_jax.networks.energy import Energy, Params, from_image_to_image, inner_product
from drl_jax.networks.image_mlp import ImageMLP
from drl_jax.plots import figures
from drl_jax.plots.figures import Panel
from drl_jax.recovery import Parameterisation, no_reference
from drl_jax.runtime import sharding
from drl_jax.storage.atomic import make_writable, write_json
from drl_jax.tools import command
from drl_jax.training import loop
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step
from drl_jax.training.step import Batch

log = logging.getLogger("drl_jax.tools.race")  # __name__ is __main__

CONFIGS = {  # by the name of the model
    "t6": "configs/digits_t6.py",
    "t100": "configs/digits.py",
    "t1k": "configs/digits_t1k.py",
    "diffusion": "configs/digits.py",
    "score": "configs/digits.py",
}
WITHOUT_ENERGY = ("diffusion", "score")
# Height and width of the images, and the distance between neighbouring pixel values in [-1, 1],
# by the value of --data.
DATA = {"digits": (8, 2 / 16), "mnist5k": (28, 2 / 255)}
# Fields of a configuration that a variant cannot change.
SET_BY_RACE = (
    "seed",
    "data.name",
    "data.classes",
    "data.image_size",
    "data.test_fraction",
    "optim.decay_steps",
    "train.num_steps",
)
TEST_FRACTION = 0.2  # of the data, as test images
EVALUATIONS = 5  # of each model
SPEED_STEPS = 20  # training steps that show the speed

# Format of each column of the table, by its name.
COLUMNS = (
    ("parameters", "{:,}"),
    ("seconds", "{:.1f}"),
    ("steps", "{:,}"),
    ("features", "{:.3f}"),
    ("confident", "{:.1%}"),
    ("pixels", "{:.3f}"),
    ("nearest", "{:.2f}"),
)
# Title, scale and column of each panel of the figure.
PANELS = (
    ("Fréchet distance, features of a classifier", "log", "features"),
    ("share of samples with a confident class", "linear", "confident"),
    ("Fréchet distance, pixels", "log", "pixels"),
)
TEST = "test images"  # name of their row
RESULTS, FIGURE = "race.json", "race.png"


def with_gradient(
    network: nn.Module, shape: tuple[int, ...], levels: Float[Array, "T"]
) -> Energy:
    """Returns a function f of value 0 whose gradient in y is the output U of a network.

        f(y, t) = <y - y', U(y', t)>,   y' = y, treated as constant

    U need not be the gradient of any function. Everything that uses only gradients accepts such
    an f: `recovery.denoising_loss`, whose own gradient is then one of first order, and
    `ladder.start_from_posterior`, which becomes ancestral sampling (Ho et al. 2020,
    algorithm 2).

    Args:
      network: U, maps (y [B, ...], level [B], keys [B] or None) to an array of y's shape.
      shape: shape of one example.
      levels: input of the network for each level t in 0..T-1.
    """

    def f(params, y, t, keys=None):
        constant = jax.lax.stop_gradient(y)
        u: Any = network.apply({"params": params}, constant, levels[t], keys)
        return inner_product(y - constant, u, t)

    return from_image_to_image(network, shape, inner_product, levels)._replace(f=f)


def of_noise(schedule: NoiseSchedule) -> Parameterisation:
    """Returns the parameterisation with which -U is the predicted noise (`with_gradient`).

    The gradient of F is U / (a sigma_bar_t), with a = a_{t+1}, but 1 at t = T - 1. The
    denoising loss is then |eps + U|² / (2 D) (Ho et al. 2020, eq. 14).
    """
    std = schedule.y_scale(jnp.arange(schedule.T)) * schedule.sigma_bar[:-1]
    return Parameterisation(std, no_reference)


def configuration(name: str, data: str, seed: int) -> ConfigDict:
    """Returns the configuration of a model.

    Args:
      name: one of `CONFIGS`; in a variant, followed by changes such as 'diffusion.T=30'.
      data: one of `DATA`.
      seed: random seed.

    Raises:
      UserError: if there is no such model, its file cannot be read, or a change names no field,
        one that the race sets, or has a value of the wrong type.
    """
    model, *changes = name.split() or [name]
    if model not in CONFIGS:
        raise UserError(f"there is no model {model!r}: use some of {', '.join(CONFIGS)}")
    if not epath.Path(CONFIGS[model]).exists():
        raise UserError(
            f"there is no {CONFIGS[model]}: run this program from the root of the repository"
        )
    config = config_lib.load(CONFIGS[model])
    for change in changes:
        _set(config, change)
    size, width = DATA[data]
    config.seed = seed
    config.data.name, config.data.image_size = data, size
    config.data.test_fraction = TEST_FRACTION
    config.data.dequantise = width if config.data.dequantise else 0.0
    config_lib.validate(config)
    if config.energy.parameterisation in config_lib.FITTED:
        raise UserError(
            f"{name!r}: the race does not fit mixtures, as config.energy.parameterisation "
            f"{config.energy.parameterisation!r} requires"
        )
    return config


def _set(config: ConfigDict, change: str) -> None:
    """Sets a field of the configuration, as 'diffusion.T=30' says.

    Raises:
      UserError: if there is no such field, or the value has another type.
    """
    field, _, text = change.partition("=")
    if field not in dict(config_lib.flatten(config)):
        raise UserError(config_lib.unknown_field(field))
    if field in SET_BY_RACE:
        raise UserError(f"{change}: the race sets config.{field} itself; leave it out")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    try:
        config.update_from_flattened_dict({field: value})
    except TypeError as error:
        raise UserError(f"{change}: {error}") from error


def make_method(name: str, config: ConfigDict) -> Method:
    """Returns the method of a model, given its name and its configuration."""
    method = method_lib.from_config(config)
    name = name.split()[0]
    if name not in WITHOUT_ENERGY:
        return method
    settings = config.energy
    if settings.network == "unet":
        network: nn.Module = method_lib.make_unet(config)
    else:
        network = ImageMLP(width=settings.ch, depth=settings.N, dropout=settings.dropout)
    schedule = method.schedule
    energy = with_gradient(network, method.energy.shape, schedule.conditioning[:-1])
    method = method._replace(energy=energy)
    if name == "diffusion":
        method = method._replace(parameterisation=of_noise(schedule))
    return method


class Judge(NamedTuple):
    """What samples are compared with.

    Attributes:
      classifier: a classifier of the training images.
      train: training images, without dequantisation.
      test: test images.
    """

    classifier: Classifier
    train: Float[np.ndarray, "n H W C"]
    test: Float[np.ndarray, "k H W C"]

    def __call__(self, samples: Float[np.ndarray, "n H W C"]) -> dict[str, float]:
        """Returns the last four columns of the table."""
        compared = self.classifier.metrics(samples, self.train, self.test)
        return {
            "features": compared["feature_frechet"],
            "confident": compared["confident"],
            "pixels": pixels.pixel_metrics(samples, self.train)["pixel_frechet"],
            "nearest": compared["nearest"]["median_ratio"],
        }


def open_judge(config: ConfigDict, workdir: epath.Path) -> Judge:
    """Reads the data and returns their judge, whose classifier is kept in the work directory.

    Raises:
      UserError: if the data cannot be read.
    """
    source = sources.open_source(config)
    train, test = (
        pipeline.load_examples(config, part) for part in (source, sources.open_held_out(config))
    )
    labels = np.asarray(source.labels)
    return Judge(classifier.of_data(config, source, train, labels, workdir), train, test)


def evaluation_times(seconds: float) -> list[float]:
    """Returns the training times of the evaluations [s]. Each is twice the one before."""
    return [seconds / 2**i for i in reversed(range(EVALUATIONS))]


def batches(
    x: Float[np.ndarray, "n *D"], config: ConfigDict
) -> Iterator[Float[np.ndarray, "B *D"]]:
    """Yields random batches with dequantisation noise, as far as configured.

    `pipeline.training_batches` would do the same, but its threads would take as much of the
    measured time as a training step of the fastest model.
    """
    rng = np.random.default_rng(config.seed)
    while True:
        batch = x[rng.integers(len(x), size=config.train.batch_size)]
        noise = rng.random(batch.shape, np.float32) - np.float32(0.5)
        yield batch + np.float32(config.data.dequantise) * noise


class Trainer:
    """Trains a model and measures the time.

    Attributes:
      seconds: training time so far, without compilation [s].
      steps: number of training steps made.
    """

    def __init__(
        self, config: ConfigDict, method: Method, mesh: Mesh, x: Float[np.ndarray, "n *D"]
    ):
        """Compiles the training step.

        Args:
          config: configuration.
          method: the model.
          mesh: devices.
          x: training images.

        Raises:
          UserError: if the batch cannot be divided by the number of devices.
        """
        sharding.require_divisible(config.train.batch_size, mesh, "train.batch_size")
        training = train_step.from_config(config)
        init_key, self._key, _ = loop.run_keys(config.seed)
        self._method, self._mesh = method, mesh
        self._limits = loop.divergence_limits(config, x[0].size)
        self._state = train_state.create_on(mesh, init_key, method.energy, training.optimiser)
        self._batches = batches(x, config)
        step: Any = train_step.compile_step(mesh, method, training)
        self._step = step.lower(self._state, self._next_batch(), self._key).compile()
        self.seconds, self.steps = 0.0, 0

    def advance(self) -> None:
        """Makes one step.

        Raises:
          UserError: if training diverged.
        """
        start = command.clock()
        self._state, metrics = jax.block_until_ready(
            self._step(self._state, self._next_batch(), self._key)
        )
        self.seconds += command.clock() - start
        loop.raise_if_diverged(self.steps, jax.tree.map(np.asarray, metrics), self._limits)
        self.steps += 1

    def averaged(self) -> Params:
        """Returns the averaged parameters."""
        return loop.generation_params(self._method, self._state, self._mesh)

    def _next_batch(self) -> Batch:
        return sharding.place({"image": next(self._batches)}, sharding.by_example(self._mesh))


def train(
    config: ConfigDict,
    method: Method,
    mesh: Mesh,
    x: Float[np.ndarray, "n *D"],
    times: Sequence[float],
) -> Iterator[Trainer]:
    """Trains a model and yields it at the end of the first step after each of several times.

    The arguments are those of `Trainer`, and the times in increasing order [s]. The learning
    rate decays to zero at the last one, whatever `config.optim.decay_steps` is.

    Raises:
      UserError: as `Trainer` does.
    """
    config = config.copy_and_resolve_references()
    rehearsal = Trainer(config, method, mesh, x)
    for _ in range(SPEED_STEPS):
        rehearsal.advance()
    steps = round(times[-1] / rehearsal.seconds * SPEED_STEPS)
    config.optim.decay_steps = max(steps, config.optim.warmup_steps + 1)
    log.info("about %d steps in %.0f s", steps, times[-1])
    trainer = Trainer(config, method, mesh, x)
    for seconds in times:
        while trainer.seconds < seconds:
            trainer.advance()
        yield trainer


def parse_sampler(text: str) -> tuple[str, int]:
    """Returns the name of a sampler and its number of steps per level, given 'mala:60'.

    Raises:
      UserError: if the text has another form, or there is no such sampler.
    """
    name, _, K = text.partition(":")
    if name not in config_lib.CHOICES["mcmc.sampler"] or not K.isdecimal():
        names = ", ".join(config_lib.CHOICES["mcmc.sampler"])
        raise UserError(
            f"--samplers contains {text!r}: give a sampler ({names}) and its number of steps, "
            "such as mala:60"
        )
    return name, int(K)


def race(
    names: Sequence[str],
    samplers: Sequence[str],
    seconds: float,
    data: str,
    seed: int,
    workdir: epath.Path,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Runs the models that have not finished, and writes race.json and race.png.

    Args:
      names: models, as `configuration` takes them.
      samplers: samplers of the further samples that the last evaluation of a model draws, such
        as mala:60.
      seconds: training time of each model [s].
      data: one of `DATA`.
      seed: random seed.
      workdir: folder of the results; if it has results, they are kept.

    Returns:
      the rows of the table as JSON values: `model`, and the fields of `COLUMNS`. The first is
      that of the test images, without parameters and training. The last one of a model also has
      `samplers`: the fields of samples drawn by each sampler. The second result has the error
      message of each model whose training diverged, by its name.

    Raises:
      UserError: if a name is unknown, or the work directory cannot be used or has other
        results.
    """
    settings = {"seconds": seconds, "data": data, "seed": seed, "samplers": list(samplers)}
    if not names:
        raise UserError("there is no model to train: give some with --racers or --variant")
    configs = {name: configuration(name, data, seed) for name in names}
    methods = {name: make_method(name, config) for name, config in configs.items()}
    chains = {text: parse_sampler(text) for text in samplers}
    for name, (text, (sampler, K)) in itertools.product(names, chains.items()):
        method_lib.with_sampler(methods[name], sampler=sampler, K=K)  # raises before training
        if name.split()[0] in WITHOUT_ENERGY and sampler in method_lib.METROPOLIS:
            raise UserError(
                f"--samplers contains {text!r}: {name!r} has no energy to accept by"
            )
    rows = command.read_rows(workdir / RESULTS, settings, missing={"samplers": []})
    make_writable(workdir)
    judge = open_judge(configs[names[0]], workdir)
    mesh, times = sharding.make_mesh(), evaluation_times(seconds)
    if not rows:
        rows = [{"model": TEST, **judge(judge.test)}]
    failed: dict[str, str] = {}
    for name, config in configs.items():
        if len(of_model(rows, name)) == EVALUATIONS:
            log.info("%s: already finished", name)
            continue
        rows = [row for row in rows if row["model"] != name]
        log.info("%s: compiling", name)
        try:
            for row in run_one(name, config, methods[name], chains, mesh, judge, times):
                rows.append(row)
                write_json(workdir / RESULTS, {"settings": settings, "rows": rows})
                write_figure(workdir / FIGURE, rows, times)
                log.info("%s: %s", name, ", ".join(f"{k} {v}" for k, v in cells(row).items()))
        except DivergenceError as error:
            failed[name] = str(error)
            log.info("%s: %s", name, error)
            rows = [row for row in rows if row["model"] != name]
            write_json(workdir / RESULTS, {"settings": settings, "rows": rows})
    return rows, failed


def run_one(
    name: str,
    config: ConfigDict,
    method: Method,
    chains: dict[str, tuple[str, int]],
    mesh: Mesh,
    judge: Judge,
    times: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """Trains one model and yields its rows of the table, one per evaluation.

    Args:
      name: name of the model.
      config: its configuration.
      method: what to train.
      chains: names of the samplers of the last evaluation, and their steps per level.
      mesh: devices.
      judge: compares samples with test images.
      times: training times of the evaluations [s].

    Raises:
      UserError: as `train` does.
    """
    _, _, sample_key = loop.run_keys(config.seed)
    n, model = len(judge.test), None
    for trainer in train(config, method, mesh, judge.train, times):
        params = trainer.averaged()
        model = model or Model.create(method, params, mesh, batch_size=n)
        model = model.with_params(params)
        row = {
            "model": name,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "seconds": trainer.seconds,
            "steps": trainer.steps,
            **judge(model.sample(sample_key, n)),
        }
        if trainer.seconds >= times[-1] and chains:
            row["samplers"] = {
                text: judge(model.with_sampler(sampler, K=K).sample(sample_key, n))
                for text, (sampler, K) in chains.items()
            }
        yield row


def of_model(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Returns the rows of one model."""
    return [row for row in rows if row["model"] == name]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns the columns of a row of the table, formatted; empty where it has no value."""
    return {name: form.format(row[name]) if name in row else "" for name, form in COLUMNS}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the results, one line per evaluation, and the distances of other samplers."""
    width = max(12, *(len(row["model"]) + 1 for row in rows))

    def line(name: str, columns: Iterable[str]) -> str:
        return f"{name:{width}}" + "".join(f"{cell:>14}" for cell in columns)

    lines = [line("", (name for name, _ in COLUMNS))]
    lines += [line(row["model"], cells(row).values()) for row in rows]
    sampled = [row for row in rows if "samplers" in row]
    names = list(dict.fromkeys(name for row in sampled for name in row["samplers"]))
    if names:
        lines += ["", line("features, by sampler", names)]
    for row in sampled:
        distances = (row["samplers"].get(name, {}).get("features") for name in names)
        lines.append(line(row["model"], (f"{d:.3f}" if d else "" for d in distances)))
    return "\n".join(lines)


def write_figure(
    path: epath.Path, rows: Sequence[dict[str, Any]], times: Sequence[float]
) -> None:
    """Writes the curves of all models against training time.

    Raises:
      UserError: if the file cannot be written.
    """
    panels = []
    for title, scale, field in PANELS:
        curves: dict[str, list[float]] = {}
        for name in dict.fromkeys(row["model"] for row in rows):
            values = [row[field] for row in of_model(rows, name)]
            missing = math.nan if name != TEST else values[0]
            curves[name] = values + [missing] * (len(times) - len(values))
        panels.append(Panel(title, scale, curves, {}, times, x_label="training time [s]"))
    figures.write_curves(path, panels)


def define_flags() -> flags.FlagValues:
    """Returns this program's flags, unparsed and separate from those of `drl_jax.main`."""
    values = flags.FlagValues()
    flags.DEFINE_list(
        "racers",
        list(CONFIGS),
        f"Models to train, separated by commas (default: {','.join(CONFIGS)}).",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "variant",
        [],
        "Model to add, with other settings, such as 't6 energy.network=unet'. Can be repeated.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "samplers",
        [],
        "Samplers of further samples, and their steps per level, such as langevin:15,mala:60.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "seconds",
        150.0,
        "Training time of each model [s] (default: 150).",
        1,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "data", "digits", list(DATA), "digits or mnist5k (default: digits).", flag_values=values
    )
    flags.DEFINE_string(
        "workdir",
        "runs/race",
        "Folder of the results (default: runs/race).",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Random seed (default: 0).", 0, flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Prints the table and returns the exit status."""
    values = define_flags()

    def tool() -> None:
        workdir = epath.Path(values.workdir).expanduser()
        rows, failed = race(
            [*values.racers, *values.variant],
            values.samplers,
            values.seconds,
            values.data,
            values.seed,
            workdir,
        )
        print(table(rows))
        if failed:
            raise UserError("; ".join(f"{name}: {error}" for name, error in failed.items()))

    return command.execute(tool, values, argv, __doc__)


if __name__ == "__main__":
    command.set_up()
    sys.exit(main(sys.argv))
