"""The task `train`: trains a model and evaluates it."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from drl_jax.data import sources
from drl_jax.plots.metric_writer import MetricWriter
from drl_jax.runtime import preemption, processes
from drl_jax.storage import lock
from drl_jax.storage.log_file import LogFile
from drl_jax.tasks import common, evaluate
from drl_jax.training import loop


def run(
    config: ConfigDict, workdir: epath.Path, resume_with_changes: bool, init_from: str | None
) -> None:
    """Trains to `config.train.num_steps`, resuming from the newest checkpoint if there is one.

    Writes to `workdir`:
      checkpoints/: the training state and its configuration (`storage.checkpoints`).
      config.json: the configuration of the newest checkpoint.
      log.txt: everything that was logged, also by earlier starts of the same run.
      data.json: what identifies the data (`storage.data_record`).
      grids/STEP.png: samples during training.
      events.out.tfevents.*: for TensorBoard: loss, learning rate, speed and statistics of the
        levels (`training.loop.Progress`), sample grids, configuration and final metrics.
      metrics.json, samples.png and, for points in the plane, toy2d.png: see `tasks.evaluate`.

    Args:
      config: configuration of the run.
      workdir: where everything goes.
      resume_with_changes: whether the run may resume although `config` changes its steps.
      init_from: WORKDIR or WORKDIR:STEP of another run, from whose parameters a new run starts.

    Raises:
      UserError: if the configuration, the data or the Inception weights cannot be used, the
        folder cannot be written to or another run is using it, or the loss diverges.
      Interrupted: if a signal stopped the training; the state is saved.
    """
    with (
        LogFile() as log_file,
        MetricWriter(workdir if processes.is_first() else None) as writer,
    ):
        source = sources.open_source(config)
        sources.require_classes(config, source)
        evaluate.require_comparable(config, source)
        inception_weights = evaluate.load_inception_weights(config)
        trained = loop.train(
            config=config,
            source=source,
            workdir=workdir,
            resume_with_changes=resume_with_changes,
            init_from=init_from,
            writer=writer,
            log_file=log_file,
        )
        report = "the training is complete and saved; --mode=evaluate repeats the measurements"
        with (
            lock.held(workdir),
            preemption.reporting(report, has_others=jax.process_count() > 1),
        ):
            metrics = evaluate.measure(
                run=common.adapted(trained),
                source=source,
                workdir=workdir,
                inception_weights=inception_weights,
            )
        writer.write_scalars(trained.step, final_scalars(metrics))


def final_scalars(metrics: Mapping[str, Any], prefix: str = "final/") -> dict[str, float]:
    """Returns the numbers in metrics.json by the names that TensorBoard shows, final/NAME.

    Args:
      metrics: the content; numbers in sections have names such as final/classifier/NAME. Lists,
        which have one number per level, are left out.
      prefix: what precedes the names.
    """
    scalars: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            scalars |= final_scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            scalars[prefix + name] = float(value)
    return scalars
