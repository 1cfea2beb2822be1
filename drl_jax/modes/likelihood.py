"""The density of the data under a model: bounds of log Z, nats, bits a dimension."""

import logging
import math
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import data, figures, signals, snapshots
from drl_jax.errors import Interrupted, UserError
from drl_jax.evaluation import density
from drl_jax.evaluation.density import Annealing, Budget
from drl_jax.files import make_writable, remove
from drl_jax.likelihood import Partition
from drl_jax.model import Model
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise
from drl_jax.progress import Progress
from drl_jax.snapshots import Snapshot

log = logging.getLogger(__name__)

SAVE = 60.0  # seconds between two saves of unfinished work


def run(workdir: epath.Path, revise: Revise, model: str | None, seed: int) -> None:
    """Bounds a model's log Z, and writes what density it gives its data.

    Args:
      workdir: where results go.
      revise: changes the configuration.
      model: what `drl_jax.load` takes; None for the work directory's own.
      seed: of all noise.

    Raises:
      UserError: if there is no model or no data, the folder cannot be written to, or the
        bounds are too far apart to be used.
      Interrupted: a signal asked for the end; all is saved.
    """
    config, trained, step = parts.load(workdir, revise, model)
    budget = Budget(**config.likelihood)
    source = data.open_source(config)
    x = np.stack(list(data.all_images(config, limit=config.evaluation.num_data)))
    folder = workdir / "likelihood" / f"step_{step}_seed_{seed}"
    make_writable(folder)
    key, data_key = jax.random.split(jax.random.key(seed))
    annealing = watched(trained, key, x, budget, folder, decisive(config, model))
    Z = annealing.partition
    schedule = trained.method.schedule
    require_usable(Z, budget, x[0].size, schedule.T)

    values = round(source.white) + 1 if source.white else None
    log_q, log_P = density.log_likelihood(
        trained, data_key, x, values, dequantised=config.data.dequantise > 0
    )
    numbers: dict[str, Any] = {
        "step": step,
        "data": source.identity,
        "num_data": len(x),
        "budget": budget._asdict(),
        "log_Z": {name: bound._asdict() for name, bound in Z._asdict().items()},
        "gap": Z.gap,
        "log_density": between(log_q, Z, unit=1.0),
    }
    told = "%(from).3f to %(to).3f, ± %(std_error).3f over the data"
    log.info(
        "log Z: %.3f ± %.3f to %.3f ± %.3f nats, effective sample sizes %.0f and %.0f of %d",
        *(Z.lower.log_Z, Z.lower.std_error, Z.upper.log_Z, Z.upper.std_error),
        *(Z.lower.effective_sample_size, Z.upper.effective_sample_size, budget.chains),
    )
    log.info(
        f"log-density of %(n)d examples, with noise %(noise).2g in them: {told} nats",
        numbers["log_density"] | {"n": len(x), "noise": schedule.sigma_bar[0]},
    )
    if log_P is not None:
        numbers["bits_per_dim"] = between(log_P, Z, unit=-1 / (x[0].size * math.log(2)))
        log.info(f"bits a dimension: {told}", numbers["bits_per_dim"])
    middle = (Z.lower.log_Z + Z.upper.log_Z) / 2
    figures.write_annealing(
        folder / "likelihood.png", density.history(annealing, schedule, budget), log_q - middle
    )
    parts.write_json(folder / "likelihood.json", numbers)
    log.info("likelihood.json and likelihood.png are in %s", folder)


def decisive(config: ConfigDict, model: str | None) -> dict[str, Any]:
    """Returns what must stay as it is when unfinished work goes on, by name."""
    names = ("likelihood.", "data.", "evaluation.num_data", "evaluation.batch_size")
    fields = config_lib.flatten(config)
    settings = {f"config.{name}": v for name, v in fields if name.startswith(names)}
    return settings | {"model": model}


def watched(
    model: Model,
    key: Key[Array, ""],
    x: Float[np.ndarray, "N *D"],
    budget: Budget,
    folder: epath.Path,
    settings: dict[str, Any],
) -> Annealing:
    """Anneals down and up (`density.annealed`), and saves the work while it is unfinished.

    Raises:
      UserError: if unfinished work is damaged, or was begun with other settings.
      Interrupted: a signal asked for the end; all is saved.
    """
    path = folder / "annealing.snapshot"
    snapshot = snapshots.read(path, settings)
    moves = density.moves(model.method.schedule, budget)
    if snapshot:
        annealing = density.from_arrays(snapshot.arrays)
        log.info("going on from move %d of %d", annealing.made, moves)
    else:
        annealing = density.begin(model, key, x, budget)
    with signals.stop_on_signal() as stop, Progress(moves, "move") as progress:
        progress.add(annealing.made)
        saved = time.monotonic()
        for later in density.annealed(model, key, annealing, budget):
            progress.add(later.made - annealing.made)
            annealing = later
            signum = stop()
            if signum or time.monotonic() - saved > SAVE:
                snapshots.write(path, Snapshot({}, density.to_arrays(annealing)), settings)
                saved = time.monotonic()
            if signum:
                raise Interrupted(signum, annealing.made)
    remove(path)
    return annealing


def require_usable(Z: Partition, budget: Budget, D: int, T: int) -> None:
    """Refuses bounds that say nothing, and warns of weights that say little.

    Raises:
      UserError: with the bounds' gap, and what would make it smaller.
    """
    gap = abs(Z.gap)  # bounds that have crossed are as wrong as bounds that are far apart
    bits = gap / (D * math.log(2))
    if not bits <= budget.max_gap:  # also where they are no numbers
        what = (
            f"the bounds of log Z are {Z.lower.log_Z:.1f} and {Z.upper.log_Z:.1f} nats, "
            f"{bits:.3g} bits a dimension apart (config.likelihood.max_gap is "
            f"{budget.max_gap:g}), so no density can be told"
        )
        if T < 1000:
            raise UserError(
                f"{what}: T = {T} noise levels are too far apart for annealing; train with "
                "--config.diffusion.T=1000, as configs/digits_t1k.py does"
            )
        raise UserError(
            f"{what}: the budget is too small; raise --config.likelihood.rungs (now "
            f"{budget.rungs}) or --config.likelihood.transitions (now {budget.transitions})"
        )
    for name, bound in Z._asdict().items():
        if not bound.meaningful:
            log.warning(
                "the effective sample size of the %s bound is %.1f of %d: a few chains decide, "
                "and it may be nats away from log Z; its error is not to be believed",
                *(name, bound.effective_sample_size, bound.chains),
            )


def between(values: Float[np.ndarray, "n"], Z: Partition, unit: float) -> dict[str, float]:
    """Returns the mean of values less log Z, between its bounds, times a unit."""
    mean = np.mean(values, dtype=np.float64)
    low, high = sorted(float(mean - bound.log_Z) * unit for bound in Z)
    error = abs(unit) * float(np.std(values, dtype=np.float64)) / math.sqrt(len(values))
    return {"from": low, "to": high, "std_error": error}
