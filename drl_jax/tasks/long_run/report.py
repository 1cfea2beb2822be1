"""Writes the results of `long_run`: pictures, curves, numbers and a summary in the log."""

import logging
import math

import numpy as np
from etils import epath

from drl_jax.metrics.diagnostics import FORGOTTEN
from drl_jax.plots import figures, images
from drl_jax.plots.figures import Panel
from drl_jax.storage.atomic import finite_or_none, write_json
from drl_jax.tasks.long_run.runner import Experiment, State, steps_to_forget

log = logging.getLogger(__name__)


def write(folder: epath.Path, state: State, experiment: Experiment, T: int) -> None:
    """Writes the results of an experiment, long_run.json last, and logs the newest statistics.

    Writes to `folder`:
      level_LEVEL.png, one per level: a row of data diffused to the level, then a row of the
        positions of chains for each recorded step.
      ladder.png: for each finished ladder, a row of samples; not written if there is none.
      curves.png: all statistics against the number of steps.
      long_run.json, with the fields:
        levels: levels whose conditionals are sampled.
        chains_per_level: number of chains per level.
        resolution: resolution of F at each level in float32 [nats] (`levels.resolution`).
        data: the statistics of data diffused to each level, with which those of the chains are
          to be compared, one value per level (`Experiment.data`).
        steps_to_forget: for each level, the number of steps after which the autocorrelation of
          the chains is below `diagnostics.FORGOTTEN`; null if the run is too short to tell.
        records: the statistics of the chains at each recorded step
          (`runner.chain_statistics`). With a classifier, label_r_hat is split R-hat of the
          classes of the denoised positions, and label_changes the mean number of changes of the
          class per chain, between the draws from which R-hat is computed
          (`diagnostics.Mixing`).
        ladder: samples, the number of samples per ladder; data.frechet, the Fréchet distance of
          as many images of the data set; and ladders, the steps, steps_per_level, frechet and,
          with a classifier, feature_frechet of each finished ladder.
        A number that is undefined or infinite is null.

    Args:
      folder: folder of the results.
      state: the state after the last step.
      experiment: what was sampled, and the data to compare it with.
      T: number of levels of the model.

    Raises:
      UserError: if a file cannot be written.
    """
    for i, level in enumerate(experiment.levels):
        rows = [experiment.condition_images[i], *(p[i] for p in state.pictures)]
        titles = ["data", *(f"step {record['step']}" for record in state.records)]
        write_rows(folder / f"level_{level}.png", rows, titles)
    if state.ladder_pictures:
        titles = [f"{ladder['steps']} steps" for ladder in state.ladders]
        write_rows(folder / "ladder.png", state.ladder_pictures, titles)
    elif not experiment.marginal:
        log.info("no samples were generated: use --num_steps=%d or more, one step per level", T)
    figures.write_curves(folder / "curves.png", panels(state, experiment))
    forgotten = steps_to_forget(state.chains, experiment)
    results = {
        "levels": experiment.levels.tolist(),
        "chains_per_level": len(experiment.t) // len(experiment.levels),
        "resolution": experiment.resolution,
        "data": experiment.data,
        "steps_to_forget": forgotten,
        "records": state.records,
        "ladder": {
            "samples": len(experiment.t),
            "data": {"frechet": experiment.image_frechet},
            "ladders": state.ladders,
        },
    }
    write_json(folder / "long_run.json", finite_or_none(results))
    last, data = state.records[-1], experiment.data
    log.info("after %d steps (in brackets: data diffused to the level):", last["step"])
    for i, level in enumerate(experiment.levels):
        log.info(
            "  level %d: F %.1f (%.1f), displacement %.2f (%.2f), acceptance %.2f, Fréchet "
            "distance %.3f (%.3f), R-hat %.3f, effective sample size %.0f, steps to an "
            "autocorrelation below %g: %s",
            level,
            last["log_density"][i],
            data["log_density"][i],
            last["displacement"][i],
            data["displacement"][i],
            _or_nan(last["acceptance"][i]),
            last["frechet"][i],
            data["frechet"][i],
            _or_nan(last["r_hat"][i]),
            _or_nan(last["effective_sample_size"][i]),
            FORGOTTEN,
            forgotten[i] or "unknown",
        )
        if experiment.features:
            log.info(
                "  level %d: feature Fréchet distance %.3f (%.3f), R-hat of the label %.3f, "
                "changes of the label per chain %.2f",
                level,
                last["feature_frechet"][i],
                data["feature_frechet"][i],
                _or_nan(last["label_r_hat"][i]),
                _or_nan(last["label_changes"][i]),
            )
    for ladder in state.ladders:
        log.info(
            "  samples with %d steps, %d per level: Fréchet distance %.3f (%.3f)",
            ladder["steps"],
            ladder["steps_per_level"],
            ladder["frechet"],
            experiment.image_frechet,
        )
        if experiment.features:
            log.info("    feature Fréchet distance %.3f", ladder["feature_frechet"])
    log.info(
        "wrote long_run.json, curves.png and pictures to %s (rows of the pictures of levels: "
        "data, then steps %s)",
        folder,
        ", ".join(str(record["step"]) for record in state.records),
    )


def write_rows(path: epath.Path, rows: list[np.ndarray], titles: list[str]) -> None:
    """Writes rows of n images in [-1, 1], or of n other examples, as one picture.

    Signals and vectors are lines, with one panel per row, which has a title. Those that are
    standardised stay so.
    """
    if rows[0].ndim > 3:
        tiles = np.concatenate(rows)
        tiles = images.slices(tiles) if tiles.ndim == 5 else tiles
        images.write_png(path, images.grid(tiles, columns=len(rows[0])))
        return
    images.write_png(path, images.rows({"samples": np.stack(rows)}, titles))


def panels(state: State, experiment: Experiment) -> list[Panel]:
    """Returns the curves of all statistics, with dotted lines for those of diffused data."""
    names = [f"level {level}" for level in experiment.levels]
    steps = [record["step"] for record in state.records]

    def panel(title: str, scale: str, statistic: str, relative: bool = False) -> Panel:
        by_step = [[_or_nan(value) for value in r[statistic]] for r in state.records]
        values = np.array(by_step).T
        exact = experiment.data.get(statistic, [])
        if relative:
            values, exact = values - np.array(exact)[:, None], [0.0]
        curves = dict(zip(names, values.tolist(), strict=True))
        return Panel(title, scale, curves, dict(zip(names, exact, strict=False)), steps)

    panels = [
        panel("log-density minus that of data [nats]", "symlog", "log_density", relative=True),
        panel("displacement |y - x_tilde| (dotted: data)", "linear", "displacement"),
        panel("acceptance since the previous record", "linear", "acceptance"),
        panel("Fréchet distance on pixels (dotted: data)", "log", "frechet"),
        panel("split R-hat, median over conditions", "log", "r_hat"),
        panel("effective sample size, all chains", "log", "effective_sample_size"),
    ]
    if experiment.features:
        title = "feature Fréchet distance of completed samples (dotted: data)"
        panels.append(panel(title, "log", "feature_frechet"))
        title = "split R-hat of the label, median over conditions"
        panels.append(panel(title, "log", "label_r_hat"))
    if not experiment.marginal:
        panels.append(
            Panel(
                title="Fréchet distance of samples (x: steps of the ladder)",
                scale="log",
                curves={"ladder": [ladder["frechet"] for ladder in state.ladders]},
                marks={"ladder": experiment.image_frechet},
                x=[ladder["steps"] for ladder in state.ladders],
            )
        )
    return panels


def _or_nan(value: float | None) -> float:
    """Returns NaN for None."""
    return math.nan if value is None else value
