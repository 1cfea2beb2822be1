"""The task `likelihood`: bounds log Z, and the log-likelihood of the data."""

import functools
import logging
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key

from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.metrics import density
from drl_jax.metrics.density import Annealing, Budget
from drl_jax.model import Model
from drl_jax.plots import figures
from drl_jax.runtime.progress import Progress
from drl_jax.sampling.annealing import Partition
from drl_jax.storage.atomic import make_writable, remove, write_json
from drl_jax.storage.runs import Run
from drl_jax.storage.snapshots import Autosave, Snapshot
from drl_jax.tasks import common

log = logging.getLogger(__name__)

# Fields of the configuration that unfinished work depends on.
SETTINGS = ("likelihood.", "data.", "evaluation.num_data", "evaluation.batch_size")


def run(run: Run, workdir: epath.Path, model: str | None, seed: int) -> None:
    """Bounds log Z of level 0 by annealing, and computes the log-likelihood of the data.

    The data are the first `config.evaluation.num_data` examples of `config.data`; the cost is
    set by `config.likelihood` (`density.Budget`). An interrupted run is resumed by the same
    command.

    Writes to `workdir`/likelihood/step_STEP_seed_SEED:
      annealing.snapshot: unfinished work; removed at the end.
      likelihood.png: the course of the annealing, and a histogram of the log-densities.
      likelihood.json, with the fields:
        step: training steps of the model.
        data: identity of the data set.
        num_data: number of examples.
        budget: `config.likelihood`.
        log_Z: stochastic bounds lower and upper, each with the fields of `annealing.Bound`
          [nats].
        gap: upper bound minus lower bound [nats].
        log_density: mean log-density of level 0 at the examples with noise sigma_bar_0, from
          one bound to the other, and the standard error over the examples [nats].
        bits_per_dim: upper bound of -log2 P(x) / D in the same form; for images only.

    Args:
      run: the trained model.
      workdir: where the results go.
      model: the name by which the model was loaded; None for the model of `workdir`. Work of
        one model is not resumed with another.
      seed: random seed.

    Raises:
      UserError: if the data cannot be used, the folder cannot be written to, unfinished work
        is damaged or has other settings, or the bounds are too far apart.
      Interrupted: if a signal stopped the annealing; the work is saved.
    """
    config = run.config
    budget = Budget(**config.likelihood)
    source = sources.open_source(config)
    limit = config.evaluation.num_data
    x = np.stack(list(pipeline.all_examples(config, source, limit=limit)))
    folder = workdir / "likelihood" / f"step_{run.step}_seed_{seed}"
    make_writable(folder)
    key, data_key = jax.random.split(jax.random.key(seed))
    settings = common.resume_settings(config, SETTINGS) | {"model": model}
    autosave = Autosave(folder / "annealing.snapshot", settings)
    annealing = anneal(run.model, key, x, budget, autosave)
    bounds = annealing.partition
    schedule = run.model.method.schedule
    require_usable(bounds, budget, D=x[0].size, T=schedule.T)

    values = round(source.white) + 1 if source.white else None
    log_q, log_P = density.log_likelihood(
        model=run.model,
        key=data_key,
        x=x,
        values=values,
        dequantised=config.data.dequantise > 0,
    )
    results: dict[str, Any] = {
        "step": run.step,
        "data": source.identity,
        "num_data": len(x),
        "budget": budget._asdict(),
        "log_Z": {name: bound._asdict() for name, bound in bounds._asdict().items()},
        "gap": bounds.gap,
        "log_density": mean_between(log_q, bounds, unit=1.0),
    }
    log.info(
        "log Z: lower bound %.3f ± %.3f nats (effective sample size %.0f of %d), upper bound "
        "%.3f ± %.3f nats (%.0f of %d)",
        bounds.lower.log_Z,
        bounds.lower.std_error,
        bounds.lower.effective_sample_size,
        budget.chains,
        bounds.upper.log_Z,
        bounds.upper.std_error,
        bounds.upper.effective_sample_size,
        budget.chains,
    )
    log.info(
        "mean log-density of %(n)d examples with noise of standard deviation %(noise).2g: "
        "%(from).3f to %(to).3f nats, standard error over the examples %(std_error).3f",
        results["log_density"] | {"n": len(x), "noise": schedule.sigma_bar[0]},
    )
    if log_P is not None:
        unit = -1 / (x[0].size * math.log(2))
        results["bits_per_dim"] = mean_between(log_P, bounds, unit=unit)
        log.info(
            "bits per dimension: %(from).3f to %(to).3f, standard error over the examples "
            "%(std_error).3f",
            results["bits_per_dim"],
        )
    middle = (bounds.lower.log_Z + bounds.upper.log_Z) / 2
    history = density.history(annealing, schedule, budget)
    figures.write_annealing(folder / "likelihood.png", history, log_q - middle)
    write_json(folder / "likelihood.json", results)
    log.info("wrote likelihood.json and likelihood.png to %s", folder)


def anneal(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "N *D"],
    budget: Budget,
    autosave: Autosave,
) -> Annealing:
    """Anneals chains in both directions (`density.annealed`), resuming saved work.

    Args:
      model: model whose level 0 is normalised.
      key: random key.
      x: data that the pass up starts from.
      budget: the cost.
      autosave: saves the work; its file is removed at the end.

    Raises:
      UserError: if unfinished work is damaged, or has other settings.
      Interrupted: if a signal stopped the annealing; the work is saved.
    """
    moves = density.moves(model.method.schedule, budget)
    if snapshot := autosave.restore():
        annealing = density.from_arrays(snapshot.arrays)
        log.info("resuming after move %d of %d", annealing.moves_done, moves)
    else:
        annealing = density.begin(model, key, x, budget)
    with autosave, Progress(moves, "move") as progress:
        progress.add(annealing.moves_done)
        for state in density.annealed(model, key, annealing, budget):
            progress.add(state.moves_done - annealing.moves_done)
            annealing = state
            autosave.step(annealing.moves_done, functools.partial(to_snapshot, annealing))
    remove(autosave.path)
    return annealing


def to_snapshot(annealing: Annealing) -> Snapshot:
    """Returns the annealing in the form in which it is saved."""
    return Snapshot(numbers={}, arrays=density.to_arrays(annealing))


def require_usable(bounds: Partition, budget: Budget, D: int, T: int) -> None:
    """Raises if the bounds are too loose; warns if an effective sample size is low.

    Args:
      bounds: of log Z.
      budget: uses max_gap, distributions, transitions.
      D: number of dimensions of an example.
      T: number of noise levels.

    Raises:
      UserError: with the gap between the bounds, and what would reduce it.
    """
    gap = abs(bounds.gap)  # bounds in the wrong order are as unreliable as distant ones
    bits = gap / (D * math.log(2))
    if not bits <= budget.max_gap:  # also true for NaN
        problem = (
            f"the bounds of log Z, {bounds.lower.log_Z:.1f} and {bounds.upper.log_Z:.1f} nats, "
            f"are {bits:.3g} bits per dimension apart, more than config.likelihood.max_gap = "
            f"{budget.max_gap:g}"
        )
        if T < 1000:
            raise UserError(
                f"{problem}: T = {T} noise levels are too far apart for annealing; train with "
                "--config.diffusion.T=1000, as configs/digits_t1k.py does"
            )
        raise UserError(
            f"{problem}: raise --config.likelihood.distributions (now {budget.distributions}) "
            f"or --config.likelihood.transitions (now {budget.transitions})"
        )
    for name, bound in bounds._asdict().items():
        if not bound.reliable:
            log.warning(
                "the effective sample size of the %s bound is %.1f of %d: a few chains "
                "dominate it, so its standard error is too small and it may be several nats "
                "from log Z",
                name,
                bound.effective_sample_size,
                bound.chains,
            )


def mean_between(
    values: Float[np.ndarray, "n"], bounds: Partition, unit: float
) -> dict[str, float]:
    """Returns the mean of `unit` * (values - log Z) for either bound, and its standard error.

    Args:
      values: unnormalised log-densities, one per example [nats].
      bounds: of log Z.
      unit: what one nat is in the unit of the result; may be negative.
    """
    mean = np.mean(values, dtype=np.float64)
    low, high = sorted(float(mean - bound.log_Z) * unit for bound in bounds)
    error = abs(unit) * float(np.std(values, dtype=np.float64)) / math.sqrt(len(values))
    return {"from": low, "to": high, "std_error": error}
