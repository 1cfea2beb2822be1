"""The task `long_run`: runs chains for thousands of steps and reports their convergence."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from drl_jax import diffusion
from drl_jax.data import pipeline, sources
from drl_jax.method import METROPOLIS
from drl_jax.metrics import labelled
from drl_jax.metrics import levels as levels_lib
from drl_jax.metrics.frechet import fit
from drl_jax.runtime import preemption
from drl_jax.sampling import chains
from drl_jax.storage import data_record, results
from drl_jax.storage.atomic import make_writable
from drl_jax.storage.runs import Run
from drl_jax.storage.snapshots import Autosave
from drl_jax.tasks import common
from drl_jax.tasks.long_run import report, runner
from drl_jax.tasks.long_run.runner import Features

# Fields of the configuration that must not change while work is unfinished.
SETTINGS = ("mcmc.", "data.", "evaluation.num_data", "evaluation.batch_size")


def run(
    run: Run,
    workdir: epath.Path,
    num_steps: int,
    num_chains: int | None,
    levels: Sequence[int],
    marginal: bool,
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Runs long chains on the conditionals, and generates samples with many steps per level.

    With `marginal`, it runs the chains on the marginals, and generates no samples.

    The same command resumes an interrupted run. With a larger `num_steps`, it continues a
    finished one.

    Writes to `workdir`/long_run/step_STEP_SAMPLER_seed_SEED, or ..._marginal_seed_SEED:
      settings.json: how the results were computed.
      chains.snapshot: the state from which a later run continues.
      level_T.png, ladder.png, curves.png and long_run.json: see `report.write`.

    Args:
      run: the trained model.
      workdir: folder of the results.
      num_steps: number of steps per chain; also the largest number of steps, of all levels
        together, with which samples are generated.
      num_chains: number of chains per level; None for as many as fit into one batch.
      levels: levels whose conditionals are sampled; empty for all levels or, if there are more
        than ten, for ten of them.
      marginal: whether the chains sample the marginals p(y_t) of the levels.
      label: class of the chains; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the chains and of the choice of images.

    Raises:
      UserError: if the data, a level or the number of chains cannot be used, the unfinished
        work in the folder was started with other settings, a chain diverges, or the folder
        cannot be written to.
      Interrupted: if a signal stopped the chains; their state is saved.
    """
    run = common.given(run, label, guidance)
    config, model = run.config, run.model
    default_levels = [group[0] for group in diffusion.level_groups(model.T)]
    sampled_levels = np.unique(list(levels) or default_levels)
    chains.require_levels(sampled_levels, model.T)
    if num_chains is None:
        fitting = config.evaluation.batch_size // len(sampled_levels)
        num_chains = max(1, fitting // chains.MIN_SHARING) * chains.MIN_SHARING
    source = sources.open_source(config)
    data_record.warn_if_changed(workdir, source)
    limit = config.evaluation.num_data
    images = pipeline.load_examples(config, common.of_label(source, label), limit=limit)
    key, experiment_key = jax.random.split(common.task_key("long_run", seed))
    kind = f"{config.mcmc.sampler}_marginal" if marginal else config.mcmc.sampler
    folder = workdir / "long_run" / f"step_{run.step}_{kind}_seed_{seed}"
    experiment = runner.prepare(
        model, experiment_key, images, sampled_levels, num_chains, marginal
    )
    if config.mcmc.sampler in METROPOLIS:
        levels_lib.warn_of_rounding(sampled_levels.tolist(), experiment.resolution)
    make_writable(folder)
    model = common.adapted(run).model
    # The classifier compares chains with images of all classes, so not those of one class.
    one_class = label is not None and int(label) > 0
    data = None if one_class else labelled.load(config, source, num_chains, workdir)
    if data:
        train_features, _ = data.classifier(data.train)
        descend_key = jax.random.fold_in(key, model.T)
        to_images = functools.partial(model.descend, descend_key, bottom=0)
        features = Features(
            data.classifier, fit(train_features), to_images, model.standardisation
        )
        experiment = runner.with_features(experiment, features)
    if marginal:
        model = common.adapted(run._replace(model=run.model.marginals())).model
    settings = {"num_chains": num_chains, "levels": sampled_levels.tolist()}
    # Earlier versions did not save this setting and had other random keys, so that the chains
    # had other conditions. `Autosave.restore` rejects their work.
    settings |= {"random keys": "common.task_key"}
    if data:
        model = model.with_labels(data.classifier.label)
        settings |= {"feature distances and labels": True}  # earlier work lacks these
    settings |= common.resume_settings(config, SETTINGS) | {"data": source.identity}
    settings |= common.condition(label, guidance)
    autosave = Autosave(folder / "chains.snapshot", settings)
    state = runner.run(model, key, experiment, num_steps, autosave)
    others = {"step": run.step, "seed": seed, "marginal": marginal, "num_steps": num_steps}
    saved = "the chains are saved: the same command writes the results"
    with preemption.reporting(saved, has_others=jax.process_count() > 1):
        results.begin(folder, settings | others, last="long_run.json")
        report.write(folder, state, experiment, model.T)
