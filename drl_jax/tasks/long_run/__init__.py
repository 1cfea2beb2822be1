"""Chains that go on for thousands of steps."""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from drl_jax import config as config_lib
from drl_jax import model as model_lib
from drl_jax.data import pipeline
from drl_jax.sampling import chains
from drl_jax.storage.atomic import make_writable
from drl_jax.tasks import common
from drl_jax.tasks.common import Revise
from drl_jax.tasks.long_run import report, runner
from drl_jax.training import step as train_step


def run(
    workdir: epath.Path,
    revise: Revise,
    num_steps: int,
    num_chains: int | None,
    levels: Sequence[str],
    seed: int,
) -> None:
    """Watches chains for thousands of steps (`long_run.watch`), going on where it stopped.

    Args:
      workdir: of a run.
      revise: changes the configuration.
      num_steps: of every chain.
      num_chains: a level; None for as many as one batch holds.
      levels: numbers of those to be watched; none for all, or for ten of many.
      seed: of all noise, and of the choice of images.

    Raises:
      UserError: if there is no checkpoint or no data, the chains asked for are impossible or
        were begun with other settings, or the folder cannot be written to.
      Interrupted: a signal asked for the end; all is saved.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    common.require_images(model, "long_run")
    T = model.method.schedule.T
    few = [group[0] for group in diffusion.level_groups(T)]
    watched = np.unique([int(level) for level in levels] or few)
    chains.require_levels(watched, T)
    chains.require_chain(model.method.sampler)
    sharing = chains.SHARING
    if num_chains is None:
        num_chains = max(1, config.evaluation.batch_size // len(watched) // sharing) * sharing
    chains.shared_conditions(num_chains)
    truth = np.stack(list(pipeline.all_images(config, limit=config.evaluation.num_data)))
    key, setting_key = jax.random.split(jax.random.key(seed))
    setting = runner.prepare(model, setting_key, truth, watched, num_chains)
    name = f"step_{step}_{config.mcmc.sampler}_seed_{seed}"
    folder = workdir / "long_run" / name
    make_writable(folder)
    common.adapt(config, model)
    settings = {"num_chains": num_chains, "levels": watched.tolist()}
    fields = config_lib.flatten(config)
    decisive = ("mcmc.", "data.", "evaluation.num_data", "evaluation.batch_size")
    settings |= {f"config.{name}": v for name, v in fields if name.startswith(decisive)}
    story = runner.run(model, key, setting, num_steps, folder, settings)
    report.write(folder, story, setting, T)
