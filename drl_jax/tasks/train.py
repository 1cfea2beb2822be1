"""The task `train`: trains a model and evaluates it."""

from etils import epath
from ml_collections import ConfigDict

from drl_jax.data import sources
from drl_jax.tasks import common, evaluate
from drl_jax.training import loop


def run(
    config: ConfigDict, workdir: epath.Path, resume_with_changes: bool, init_from: str | None
) -> None:
    """Trains to `config.train.num_steps`, resuming from the newest checkpoint if there is one.

    Writes to `workdir`:
      checkpoints/: the training state and its configuration (`storage.checkpoints`).
      grids/STEP.png: samples during training.
      events.out.tfevents.*: TensorBoard's loss, energies, acceptance and sample grids.
      metrics.json, samples.png and, for points, toy2d.png: see `tasks.evaluate`.

    Args:
      config: configuration of the run.
      workdir: where everything goes.
      resume_with_changes: whether the run may resume although `config` changes its steps.
      init_from: WORKDIR or WORKDIR:STEP of another run, from whose parameters a new run starts.

    Raises:
      UserError: if the configuration, the data or the Inception weights cannot be used, the
        folder cannot be written to, or the loss diverges.
      Interrupted: if a signal stopped the training; the state is saved.
    """
    source = sources.open_source(config)
    inception_weights = evaluate.load_inception_weights(config)
    trained = loop.train(
        config=config,
        source=source,
        workdir=workdir,
        resume_with_changes=resume_with_changes,
        init_from=init_from,
    )
    trained = common.adapted(trained)
    evaluate.measure(
        run=trained, source=source, workdir=workdir, inception_weights=inception_weights
    )
