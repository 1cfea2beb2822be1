"""The task `likelihood`: bounds log Z, and the log-likelihood of the data."""

import functools
import logging
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key

from drl_jax.data import mixtures, pipeline, sources
from drl_jax.data.sources import Source
from drl_jax.errors import UserError
from drl_jax.metrics import baselines, density, levels
from drl_jax.metrics.density import Annealing, Budget
from drl_jax.model import Model
from drl_jax.plots import figures, images
from drl_jax.runtime import preemption
from drl_jax.runtime.progress import Progress
from drl_jax.sampling import annealing as annealing_lib
from drl_jax.sampling.annealing import Bound, Partition
from drl_jax.storage import data_record
from drl_jax.storage import results as results_lib
from drl_jax.storage.atomic import make_writable, remove, write_json
from drl_jax.storage.runs import Run
from drl_jax.storage.snapshots import Autosave, Snapshot
from drl_jax.tasks import common

log = logging.getLogger(__name__)

# Fields of the configuration that unfinished work depends on.
SETTINGS = (
    "likelihood.",
    "data.",
    "evaluation.num_data",
    "evaluation.split",
    "evaluation.batch_size",
)

RESOLUTION_EXAMPLES = 16  # number of examples from which the resolution of F is computed

# Passes that give the lower and the upper bounds, described for log lines.
LOWER = {
    "levels": "chains through the levels, from white noise",
    "tempered": "chains through hotter versions of level 0, from a wide Gaussian",
}
UPPER = {
    "from_data": "chains up through the levels from data",
    "from_model": "chains up through the levels from the model's own samples",
}


def run(
    run: Run,
    workdir: epath.Path,
    model: str | None,
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Bounds log Z of level 0 by annealing, and computes the log-likelihood of the data.

    The data are the first `config.evaluation.num_data` examples that are held out from
    training, where there are such examples (`sources.open_held_out`); the cost is set by
    `config.likelihood` (`density.Budget`). A pilot with few chains first finds out whether the
    bounds contradict each other. An interrupted run is resumed by the same command.

    Writes to `workdir`/likelihood/step_STEP_seed_SEED:
      annealing.snapshot: unfinished work; removed at the end.
      settings.json: how the results were computed.
      likelihood.png: the course of the annealing, and a histogram of the log-densities.
      likelihood.json, with the fields:
        step: training steps of the model.
        data: identity of the data set.
        split: which part of the data set the examples are.
        held_out: whether training is known not to have used the examples.
        num_data: number of examples.
        budget: `config.likelihood`.
        log_Z: the bounds of log Z (`annealing.Partition`), each with the fields of
          `annealing.Bound` [nats]: lower, with levels and tempered; and upper, with from_data
          and from_model, which are bounds only if their chains start from exact samples of
          level 0.
        agreement: p-values of the hypothesis that these chains do start from exact samples
          (`annealing.Agreement`).
        detectable: about how much undiscovered regions must raise log Z to be noticed
          (`annealing.Partition.detectable`) [nats].
        gap: `Partition.upper` minus `Partition.lower` [nats]. Both hold in expectation, so
          it can be negative by chance.
        log_density: mean log-density of level 0 at the examples with noise sigma_bar_0, as
          from (with `Partition.upper` as log Z), to (with `Partition.lower`), and std_error
          over the examples [nats]. If the gap is negative, from exceeds to.
        baselines: for vectors and signals, if held_out: the mean log-density of the
          same examples, also with noise sigma_bar_0, under simple densities that are fitted
          to training examples with this noise (`baselines.log_densities`), and num_train, the
          number of the latter.
        bits_per_dim: bound of -log2 P(x) / D, as from (with `Partition.lower` as log Z), to
          (with `Partition.upper`), and std_error; for images only. The same holds.

    Args:
      run: the trained model.
      workdir: where the results go.
      model: the name by which the model was loaded; None for the model of `workdir`. Work of
        one model is not resumed with another.
      label: class of the density; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed.

    Raises:
      UserError: if the data cannot be used, the folder cannot be written to, unfinished work
        is damaged or has other settings, the bounds are too far apart or contradict each
        other, or the model is not finite.
      Interrupted: if a signal has arrived; the work is saved.
    """
    run = common.given(run, label, guidance)
    config = run.config
    if config.evaluation.dtype != "float32":
        raise UserError(
            f"config.evaluation.dtype is {config.evaluation.dtype!r}: the weights of annealing "
            "require 'float32'"
        )
    budget = Budget(**config.likelihood)
    source = common.of_label(sources.open_held_out(config), label)
    data_record.warn_if_changed(model or workdir, source)
    limit = config.evaluation.num_data
    x = pipeline.load_examples(config, source, limit=limit)
    folder = workdir / "likelihood" / f"step_{run.step}_seed_{seed}"
    make_writable(folder)
    key, data_key = jax.random.split(common.task_key("likelihood", seed))
    settings = common.resume_settings(config, SETTINGS)
    settings |= {"model": model, "data": source.identity}
    settings |= common.condition(label, guidance)
    autosave = Autosave(folder / "annealing.snapshot", settings)
    some = x[:RESOLUTION_EXAMPLES]
    f = np.asarray(run.model.f(some, np.zeros(len(some), int)))
    common.require_finite(f, "values of f at examples", common.PARAMETERS_DIVERGED)
    temperature = np.asarray(run.model.method.parameterisation.temperature)
    levels.warn_of_rounding([0], [levels.resolution(f, temperature[0])])
    annealing = anneal(run.model, key, x, budget, autosave)
    bounds = annealing.partition(budget.burn_in)
    try:
        require_usable(bounds, budget, D=x[0].size, T=run.model.T)
    except UserError:
        remove(autosave.path)  # what helps are other settings, with which it is not resumed
        raise
    saved = "the annealing is complete and saved: the same command writes the results"
    with preemption.reporting(saved, has_others=jax.process_count() > 1):
        settings = settings | {"step": run.step, "seed": seed}
        write(folder, run, annealing, bounds, budget, x, source, data_key, settings, label)
    remove(autosave.path)


def write(
    folder: epath.Path,
    run: Run,
    annealing: Annealing,
    bounds: Partition,
    budget: Budget,
    x: Float[np.ndarray, "N *D"],
    source: Source,
    key: Key[Array, ""],
    settings: dict[str, Any],
    label: str | None,
) -> None:
    """Computes the log-likelihood of the data, and writes and logs all results of `run`.

    Args:
      folder: folder of the results.
      run: the trained model.
      annealing: the finished annealing.
      bounds: its bounds of log Z.
      budget: its cost.
      x: the data.
      source: the data set that they are from.
      key: random key of the noise of the data.
      settings: how the results were computed, as JSON values by name.
      label: class of the data; None: none.

    Raises:
      UserError: if a file cannot be written.
    """
    schedule = run.model.method.schedule
    values = round(source.white) + 1 if source.white else None
    log_q, log_P = density.log_likelihood(
        model=run.model,
        key=key,
        x=x,
        values=values,
        dequantised=run.config.data.dequantise > 0,
    )
    results: dict[str, Any] = {
        "step": run.step,
        "data": source.identity,
        "split": source.split,
        "held_out": source.held_out,
        "num_data": len(x),
        "budget": budget._asdict(),
        "log_Z": {
            "lower": {name: getattr(bounds, name)._asdict() for name in LOWER},
            "upper": {name: getattr(bounds, name)._asdict() for name in UPPER},
        },
        "agreement": bounds.agreement._asdict(),
        "detectable": bounds.detectable,
        "gap": bounds.gap,
        "log_density": mean_between(log_q, bounds, unit=1.0),
    }
    for line in described(bounds):
        log.info("%s", line)
    where = f"on {'held-out' if source.held_out else 'training'} data ({source.split} split)"
    log.info(
        "mean log-density of %(n)d examples with noise of standard deviation %(noise).2g, "
        "%(where)s: at most %(to).3f nats, and at least %(from).3f nats if the upper bounds of "
        "log Z hold; standard error over the examples %(std_error).3f nats",
        results["log_density"] | {"n": len(x), "noise": schedule.sigma_bar[0], "where": where},
    )
    own_test = source.held_out and run.config.data.name not in mixtures.PLANAR_SHAPES
    if own_test and not images.are_images(run.model.shape):
        results["baselines"] = baseline_densities(run, key, x, label)
    if log_P is not None:
        unit = -1 / (x[0].size * math.log(2))
        results["bits_per_dim"] = mean_between(log_P, bounds, unit=unit)
        log.info(
            "bits per dimension %(where)s: at most %(to).3f if the upper bounds hold (with the "
            "lower bound of log Z: %(from).3f); standard error over the examples "
            "%(std_error).3f",
            results["bits_per_dim"] | {"where": where},
        )
    middle = (bounds.lower.log_Z + bounds.upper.log_Z) / 2
    history = density.history(annealing, schedule, budget)
    results_lib.begin(folder, settings, last="likelihood.json")
    figures.write_annealing(folder / "likelihood.png", history, log_q - middle)
    write_json(folder / "likelihood.json", results)
    log.info("wrote likelihood.json and likelihood.png to %s", folder)


def baseline_densities(
    run: Run, key: Key[Array, ""], x: Float[np.ndarray, "n *D"], label: str | None
) -> dict[str, Any]:
    """Returns and logs the field `baselines` of `run`.

    Args:
      run: the trained model.
      key: random key of the noise.
      x: held-out data.
      label: class of the data; None: none.
    """
    config = run.config
    train = common.of_label(sources.open_source(config), label)
    clean = pipeline.load_examples(config, sources.random_part(train, baselines.MAX_EXAMPLES))
    train_key, key = jax.random.split(key)
    found = baselines.log_densities(
        common.with_noise_of_level_0(run.model, train_key, clean),
        common.with_noise_of_level_0(run.model, key, x),
    )
    log.info(
        "mean log-density of the same examples under densities fitted to %d training examples: "
        "Gaussian %.3f nats, mixture of %d Gaussians %.3f nats, kernel density estimate %.3f "
        "nats",
        len(clean),
        found["gaussian"]["log_density"],
        found["mixture"]["components"],
        found["mixture"]["log_density"],
        found["kernel"]["log_density"],
    )
    return {"num_train": len(clean), **found}


def described(bounds: Partition) -> list[str]:
    """Returns log lines that say what each pass of the annealing bounds."""
    lines = ["log Z is at least (in expectation, however badly the chains mix):"]
    lines += [row(bounds, name, title) for name, title in LOWER.items()]
    lines += ["log Z is at most (if the chains start from exact samples of level 0):"]
    lines += [row(bounds, name, title) for name, title in UPPER.items()]
    excess = bounds.lower.log_Z - bounds.upper.log_Z
    if excess > 0:
        lines.append(
            f"the lower bound exceeds the upper one by {excess:.3f} nats, as can happen by "
            "chance to bounds that hold in expectation; the limits below are then reversed, too"
        )
    p = bounds.agreement
    return [
        *lines,
        "p-values of the hypothesis that chains from data and from samples start from level 0: "
        f"{p.order:.2g} (order of the bounds), {p.log_density:.2g} (equal distributions of the "
        f"log-density), {p.log_weight:.2g} (equal distributions of the log-weight)",
        "regions that only tempered chains reach would have been noticed if they raised log Z "
        f"by more than about {bounds.detectable:.2g} nats",
    ]


def row(bounds: Partition, name: str, title: str) -> str:
    """Returns the log line of one bound."""
    bound: Bound = getattr(bounds, name)
    return (
        f"  {bound.log_Z:.3f} ± {bound.std_error:.3f} nats: {title} (effective sample size "
        f"{bound.effective_sample_size:.0f} of {bound.chains})"
    )


def anneal(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "N *D"],
    budget: Budget,
    autosave: Autosave,
) -> Annealing:
    """Anneals the chains of all passes (`density.annealed`), resuming saved work.

    A new annealing begins with a pilot (`density.pilot`).

    Args:
      model: model whose level 0 is normalised.
      key: random key.
      x: data that the pass `from_data` starts from.
      budget: the cost.
      autosave: saves the work, also at the end.

    Raises:
      UserError: if unfinished work is damaged, or has other settings; or if the bounds of the
        pilot contradict each other.
      Interrupted: if a signal stopped the annealing; the work is saved.
    """
    moves = density.moves(model.method.schedule, budget)
    if snapshot := autosave.restore():
        annealing = density.from_arrays(snapshot.arrays)
        log.info("resuming after move %d of %d", annealing.moves_done, moves)
    else:
        annealing = density.begin(model, key, x, budget)
        require_consistent(*density.pilot(model, key, annealing, budget), budget)
    with autosave, Progress(moves, "move") as progress:
        progress.add(annealing.moves_done)
        for state in density.annealed(model, key, annealing, budget):
            progress.add(state.moves_done - annealing.moves_done)
            annealing = state
            autosave.step(annealing.moves_done, functools.partial(to_snapshot, annealing))
        autosave.save(to_snapshot(annealing))
    return annealing


def require_consistent(lower: Bound, upper: Bound, budget: Budget) -> None:
    """Raises if the bounds of the pilot contradict each other, or are not numbers.

    Args:
      lower: from chains through the levels.
      upper: from chains from data.
      budget: uses burn_in.

    Raises:
      UserError: with the bounds, what they mean, and what can be done.
    """
    if math.isnan(lower.log_Z) or math.isnan(upper.log_Z):
        raise UserError(
            "bounds of log Z from a few chains are not numbers, because log-densities are not: "
            f"{common.PARAMETERS_DIVERGED}"
        )
    p = annealing_lib.contradiction(lower, upper)
    log.info(
        "pilot with %d chains per pass: log Z is at least %.1f nats, and at most %.1f nats if "
        "those from data start from level 0",
        lower.chains,
        lower.log_Z,
        upper.log_Z,
    )
    if p < annealing_lib.PILOT_FALSE_ALARM:
        raise UserError(
            f"log Z is at least {lower.log_Z:.1f} nats, but chains from data give "
            f"{upper.log_Z:.1f} nats (p-value at most {max(p, 1e-99):.1g}): they miss regions "
            "that are probable at level 0 and contain no data, so the density that this model "
            "has learned is not that of its data; train it further, or raise "
            f"--config.likelihood.burn_in (now {budget.burn_in})"
        )


def to_snapshot(annealing: Annealing) -> Snapshot:
    """Returns the annealing in the form in which it is saved."""
    return Snapshot(numbers={}, arrays=density.to_arrays(annealing))


def require_usable(bounds: Partition, budget: Budget, D: int, T: int) -> None:
    """Raises if the bounds contradict each other or are too loose; warns if they are weak.

    Args:
      bounds: of log Z.
      budget: uses max_gap, distributions, transitions, burn_in.
      D: number of dimensions of an example.
      T: number of noise levels.

    Raises:
      UserError: with the bounds, what is wrong with them, and what can be done.
    """
    rejected = bounds.agreement.rejected
    data, own = bounds.from_data, bounds.from_model
    if "order" in rejected:
        raise UserError(
            f"log Z is at least {bounds.lower.log_Z:.3f} ± {bounds.lower.std_error:.3f} nats, "
            "but the chains up through the levels give less: "
            f"{data.log_Z:.3f} ± {data.std_error:.3f} from data, "
            f"{own.log_Z:.3f} ± {own.std_error:.3f} from the model's own samples (p-value "
            f"{bounds.agreement.order:.1g}): these chains miss regions that are probable at "
            "level 0, so they do not bound log Z from above; train the model further, or raise "
            f"--config.likelihood.burn_in (now {budget.burn_in})"
        )
    gap = abs(bounds.gap)  # bounds in the wrong order are as unreliable as distant ones
    per_bit = D * math.log(2)
    if not gap / per_bit <= budget.max_gap:  # also true for NaN
        problem = (
            f"the bounds of log Z, {bounds.lower.log_Z:.1f} and {bounds.upper.log_Z:.1f} nats, "
            f"are {gap / per_bit:.3g} bits per dimension apart, more than "
            f"config.likelihood.max_gap = {budget.max_gap:g}"
        )
        more = f", or train with more noise levels than {T}" if T < 1000 else ""
        raise UserError(
            f"{problem}: raise --config.likelihood.distributions (now {budget.distributions}) "
            f"or --config.likelihood.transitions (now {budget.transitions}){more}"
        )
    if rejected:
        raise UserError(
            "chains from data and from the model's own samples differ after "
            f"{budget.burn_in} moves on level 0, in log-density (p-value "
            f"{bounds.agreement.log_density:.1g}) or log-weight (p-value "
            f"{bounds.agreement.log_weight:.1g}): at most one of the two sets comes from level "
            f"0, so neither {data.log_Z:.3f} nor {own.log_Z:.3f} nats is known to be an upper "
            f"bound of log Z; raise --config.likelihood.burn_in (now {budget.burn_in})"
        )
    for name, title in (LOWER | UPPER).items():
        bound: Bound = getattr(bounds, name)
        if not bound.reliable:
            log.warning(
                "the effective sample size of the %s is %.1f of %d: a few chains dominate "
                "their bound of log Z, so the bound may be several nats from log Z, and its "
                "standard error is too small",
                title,
                bound.effective_sample_size,
                bound.chains,
            )
    if bounds.detectable / per_bit > budget.max_gap:
        log.warning(
            "regions that only tempered chains reach would be noticed only if they raised log "
            "Z by more than about %.2g nats (%.2g bits per dimension); raise "
            "--config.likelihood.distributions (now %d)",
            bounds.detectable,
            bounds.detectable / per_bit,
            budget.distributions,
        )


def mean_between(
    values: Float[np.ndarray, "n"], bounds: Partition, unit: float
) -> dict[str, float]:
    """Returns the mean of `unit` * (values - log Z) for both bounds, and its standard error.

    `from` is less than `to`, unless the bounds of log Z have crossed: these hold only in
    expectation.

    Args:
      values: unnormalised log-densities, one per example [nats].
      bounds: of log Z.
      unit: what one nat is in the unit of the result; may be negative.
    """
    mean = np.mean(values, dtype=np.float64)
    ends = [unit * float(mean - bound.log_Z) for bound in (bounds.upper, bounds.lower)]
    low, high = ends if unit > 0 else reversed(ends)
    error = abs(unit) * float(np.std(values, dtype=np.float64)) / math.sqrt(len(values))
    return {"from": low, "to": high, "std_error": error}
