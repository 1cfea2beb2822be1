"""Measures the samples of a trained model against the cost of drawing them.

    python -m drl_jax.tools.steps --workdir=DIR [--K=1,3,5,8,15,30]
        [--samplers=langevin,mala] [--levels=100,50,25] [--num_samples=359]
        [--b_squared=8e-4] [--seed=0]

The number of steps per level, K, the sampler and the number of noise levels may differ from
those of training. For each value of --K, --samplers and --levels, the program draws samples,
and prints a row of a Markdown table:

- levels: those that samples pass through, evenly spaced among the model's
  (`config.mcmc.levels`).
- b²: determines the step sizes of Langevin dynamics. By default K b² is the same as in training
  (unless K was 0 there): step sizes are inversely proportional to the square root of K (Zhu et
  al. 2024). --b_squared is used for all K. The step sizes of MALA and HMC are adapted.
- evaluations: of the networks, per sample: gradients of f (for the chains, for starting points
  from `posterior`, and for the final denoising) and predictions of the initialiser. Those that
  adapt the step sizes are not counted.
- ms: time per sample, without compilation [ms]: CPU time, the sum over threads, or wall-clock
  time on accelerators.
- features: squared Fréchet distance to the training images, in the features of a classifier of
  the data (`metrics.classifier`).
- confident: share of samples with a class of probability above 0.9.
- pixels: squared Fréchet distance to the data in pixels. It takes the place of the other two if
  the data have no labels, or too few images.

The last row is for comparison: as many test images or, without labels, two halves of the data.

With K = 0 there are no chains, and each level's starting points take their place; all samplers
share the row. This is impossible if chains start at x_tilde. If samples are not finite, because
the chains diverged, the last columns are empty.

After each row, the results are written to steps.json in the work directory, and the curves to
steps.png. Rows that are there are not measured again.
"""

import itertools
import logging
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.method import METROPOLIS
from drl_jax.metrics import labelled, pixels
from drl_jax.metrics.labelled import MAX_IN_MEMORY, Labelled
from drl_jax.plots import figures, images
from drl_jax.plots.figures import Panel
from drl_jax.storage import results, runs
from drl_jax.storage.atomic import finite_or_none, make_writable, write_json
from drl_jax.storage.runs import Run
from drl_jax.tools import command, flops

log = logging.getLogger("drl_jax.tools.steps")  # __name__ is __main__

START = "none"  # in place of the sampler if K = 0
# Name and format of each column of the table, by its field; one without values is left out.
COLUMNS = {
    "sampler": ("sampler", "{}"),
    "levels": ("levels", "{}"),
    "K": ("K", "{}"),
    "b_squared": ("b²", "{:.3g}"),
    "evaluations": ("evaluations", "{:,}"),
    "seconds": ("ms", "{:.3g}"),
    "features": ("features", "{:.3f}"),
    "confident": ("confident", "{:.1%}"),
    "pixels": ("pixels", "{:.3f}"),
}
# Title and scale of each panel of the figure, by the field that it shows.
PANELS = {
    "features": ("Fréchet distance, features of a classifier", "log"),
    "confident": ("share of samples with a confident class", "linear"),
    "pixels": ("Fréchet distance, pixels", "log"),
}
RESULTS, FIGURE = "steps.json", "steps.png"


class Judge(NamedTuple):
    """What samples are compared with.

    Attributes:
      labelled: labelled images and their classifier; None: there are none.
      data: images of the data, for the distance in pixels; only used without labels.
    """

    labelled: Labelled | None
    data: Float[np.ndarray, "n H W C"]

    @property
    def reference(self) -> str:
        """Name of the images that samples are compared with in the last row."""
        return "two halves of the data" if self.labelled is None else "test images"

    def __call__(
        self, samples: Float[np.ndarray, "n H W C"]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the last columns of the row of samples, and those of the last row."""
        if self.labelled is None:
            of = pixels.pixel_metrics(samples, self.data)
            return {"pixels": of["pixel_frechet"]}, {
                "pixels": of["pixel_frechet_of_data_halves"]
            }
        classifier, train, test, *_ = self.labelled
        of = classifier.metrics(samples, train, test)
        return (
            {"features": of["feature_frechet"], "confident": of["confident"]},
            {"features": of["feature_frechet_of_test"], "confident": of["confident_of_test"]},
        )


def open_judge(run: Run, num_samples: int, workdir: epath.Path) -> Judge:
    """Reads the data of a run and returns their judge.

    Args:
      run: the trained model.
      num_samples: number of samples that will be compared.
      workdir: keeps the classifier of the data if their own folder cannot.

    Raises:
      UserError: if the data cannot be read.
    """
    source = sources.open_source(run.config)
    with_labels = labelled.load(run.config, source, num_samples, workdir)
    limit = min(run.config.evaluation.num_data, MAX_IN_MEMORY)
    if with_labels:
        return Judge(with_labels, with_labels.train)
    return Judge(None, pipeline.load_examples(run.config, source, limit))


def configurations(
    config: ConfigDict,
    samplers: Sequence[str],
    K: Sequence[int],
    b_squared: float | None,
    levels: Sequence[int] = (0,),
) -> list[ConfigDict]:
    """Returns one configuration per row of the table, in this order.

    Args:
      config: configuration of the trained model.
      samplers: values of `config.mcmc.sampler`.
      K: numbers of steps per level.
      b_squared: b² of Langevin dynamics; None: K b² stays as in training.
      levels: numbers of noise levels; 0 for all.

    Raises:
      UserError: if a number of steps or levels or a sampler cannot be used with the model.
    """
    if 0 in K and config.mcmc.start == "x_tilde":
        raise UserError(
            "--K contains 0, but the chains of this model start at x_tilde, and without steps "
            "its samples would be noise: give 1 or more"
        )
    found: dict[tuple[Any, ...], ConfigDict] = {}
    for T, sampler, steps in itertools.product(levels, samplers, K):
        each = config.copy_and_resolve_references()
        each.mcmc.sampler, each.mcmc.K, each.mcmc.levels = sampler, steps, T
        if b_squared is not None:
            each.mcmc.b_squared = b_squared
        elif steps and config.mcmc.K:
            each.mcmc.b_squared = config.mcmc.b_squared * config.mcmc.K / steps
        if sampler in METROPOLIS:
            each.mcmc.noise_scale = 1.0
        if not steps:
            each.mcmc.sampler = "langevin"  # no adaptation
        config_lib.validate(each)
        found.setdefault(tuple(settings_of(each).values()), each)
    return list(found.values())


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """Returns the first columns of a row of the table, by which the row is identified."""
    mcmc = config.mcmc
    return {
        "sampler": mcmc.sampler if mcmc.K else START,
        "levels": flops.levels(config),
        "K": mcmc.K,
        "b_squared": mcmc.b_squared if mcmc.K and mcmc.sampler not in METROPOLIS else None,
    }


def measure(
    run: Run, config: ConfigDict, n: int, key: Key[Array, ""], judge: Judge
) -> tuple[dict[str, Any], dict[str, float]]:
    """Draws samples, and returns their row of the table and the last columns of the last row.

    Args:
      run: the trained model.
      config: one of `configurations`.
      n: number of samples.
      key: random key. Rows with equal keys have the same white noise.
      judge: compares the samples with data.
    """
    sample_key, adapt_key = jax.random.split(key)
    config = config.copy_and_resolve_references()
    config.evaluation.batch_size = min(n, config.evaluation.batch_size)
    model = runs.reconfigure(run, config).model
    mcmc = config.mcmc
    if mcmc.sampler in METROPOLIS:
        model, _ = model.adapt(adapt_key, mcmc.warmup_steps, mcmc.target_acceptance)
    model.sample(sample_key, n)  # compiles
    start = command.clock()
    samples = model.sample(sample_key, n)
    seconds = (command.clock() - start) / n
    counts = flops.evaluations(config)
    row = {
        **settings_of(config),
        "evaluations": sum(counts),
        **counts._asdict(),
        "seconds": seconds,
    }
    if not np.isfinite(samples).all():
        return row, {}
    of_samples, of_reference = judge(samples)
    return finite_or_none(row | of_samples), of_reference


def steps(
    workdir: epath.Path,
    samplers: Sequence[str],
    K: Sequence[int],
    num_samples: int,
    b_squared: float | None,
    seed: int,
    levels: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """Measures the rows that are not in steps.json, and writes steps.json and steps.png.

    Args:
      workdir: work directory of a trained model of images.
      samplers: values of `config.mcmc.sampler`.
      K: numbers of steps per level.
      num_samples: number of samples of each row.
      b_squared: b² of Langevin dynamics; None: K b² stays as in training.
      seed: random seed.
      levels: numbers of noise levels; 0 for all.

    Returns:
      the rows of the table as JSON values: the fields of `COLUMNS`, and `gradients` and
      `proposals`, whose sum is `evaluations`. `seconds` is the time per sample [s]. Rows of
      earlier calls are among them; the last row is that of the data.

    Raises:
      UserError: if there is no model of images in the work directory, it cannot be used with
        these samplers and steps, or steps.json has results with other settings.
    """
    run = runs.load_workdir(workdir)
    if not images.are_images(run.model.shape):
        raise UserError(f"the model in {workdir} is one of points: this program needs images")
    configs = configurations(run.config, samplers, K, b_squared, levels)
    settings = {
        "step": run.step,
        "parameters": results.digest(run.model.params),
        "num_samples": num_samples,
        "seed": seed,
    }
    rows = command.read_rows(workdir / RESULTS, settings)
    make_writable(workdir)
    judge = open_judge(run, num_samples, workdir)
    *rows, last = rows or [{"sampler": judge.reference}]
    for config in configs:
        wanted = settings_of(config)
        if any(row | wanted == row for row in rows):
            log.info("%s: already measured", wanted)
            continue
        row, of_reference = measure(run, config, num_samples, jax.random.key(seed), judge)
        rows, last = [*rows, row], last | of_reference
        write_json(workdir / RESULTS, {"settings": settings, "rows": [*rows, last]})
        write_figure(workdir / FIGURE, [*rows, last])
        log.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
    return [*rows, last]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table, ordered by sampler and number of evaluations."""
    *drawn, last = rows
    drawn.sort(key=lambda row: (row["sampler"] != START, row["sampler"], row["evaluations"]))
    fields = [name for name in COLUMNS if any(name in row for row in rows)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        if value is None:
            return ""
        return COLUMNS[name][1].format(1000 * value if name == "seconds" else value)

    lines = [line([COLUMNS[name][0] for name in fields]), line(["---"] * len(fields))]
    lines += [line([cell(row, name) for name in fields]) for row in [*drawn, last]]
    return "\n".join(lines)


def write_figure(path: epath.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the curves of all samplers against the number of evaluations.

    A row without steps belongs to all curves; the last row is a horizontal line.

    Raises:
      UserError: if the file cannot be written.
    """

    def value(row, field):
        """Returns a value, NaN for one that is missing or was not finite."""
        return math.nan if row.get(field) is None else row[field]

    *drawn, last = sorted(rows, key=lambda row: row.get("evaluations", math.inf))
    x = [row["evaluations"] for row in drawn]
    names = list(dict.fromkeys(row["sampler"] for row in drawn))
    names = [name for name in names if name != START] or names
    panels = []
    for field, (title, scale) in PANELS.items():
        if field not in last:
            continue
        curves = {
            name: [
                value(row, field) if row["sampler"] in (name, START) else math.nan
                for row in drawn
            ]
            for name in names
        }
        curves[last["sampler"]] = [value(last, field)] * len(x)
        panels.append(Panel(title, scale, curves, {}, x, x_label="evaluations per sample"))
    if panels:
        figures.write_curves(path, panels)


def define_flags() -> flags.FlagValues:
    """Returns this program's flags, unparsed and separate from those of `drl_jax.main`."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "Work directory of the trained model.", flag_values=values
    )
    flags.DEFINE_list(
        "K",
        ["1", "3", "5", "8", "15", "30"],
        "Numbers of steps per level, separated by commas (default: 1,3,5,8,15,30).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "samplers",
        ["langevin"],
        "Samplers, separated by commas (default: langevin).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "levels",
        ["0"],
        "Numbers of noise levels, separated by commas; 0: all (default: 0).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_samples", 359, "Number of samples per row (default: 359).", 2, flag_values=values
    )
    flags.DEFINE_float(
        "b_squared",
        None,
        "b² of Langevin dynamics (default: K b² is that of training).",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Random seed (default: 0).", 0, flag_values=values)
    return values


def parse_numbers(flag: str, texts: Sequence[str]) -> list[int]:
    """Returns the numbers in a flag such as --K.

    Raises:
      UserError: if there are none, or one is not a whole number.
    """
    for text in texts:
        if not text.isdecimal():
            raise UserError(f"--{flag} contains {text!r}: give whole numbers such as 1,3,8")
    if not texts:
        raise UserError(f"--{flag} is empty: give whole numbers such as 1,3,8")
    return [int(text) for text in texts]


def main(argv: Sequence[str]) -> int:
    """Prints the table and returns the exit status."""
    values = define_flags()

    def tool() -> None:
        if not values.workdir:
            raise UserError("there is no --workdir: give that of a trained model")
        if not values.samplers:
            raise UserError("--samplers is empty: give langevin, mala or hmc")
        rows = steps(
            epath.Path(values.workdir).expanduser(),
            values.samplers,
            parse_numbers("K", values.K),
            values.num_samples,
            values.b_squared,
            values.seed,
            parse_numbers("levels", values.levels),
        )
        print(table(rows))

    return command.execute(tool, values, argv, __doc__)


if __name__ == "__main__":
    command.set_up()
    sys.exit(main(sys.argv))
