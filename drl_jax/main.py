"""Trains, samples and evaluates energy-based models (diffusion recovery likelihood).

python -m drl_jax.main --config=configs/digits.py --workdir=DIR
python -m drl_jax.main --mode=sample --workdir=DIR
python -m drl_jax.main --mode=inpaint --mask=centre --workdir=DIR
python -m drl_jax.main --mode=plan --config=configs/cifar10.py --topology=v5e:2x4
"""

import importlib
import logging
import sys
import time
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from drl_jax import config as config_lib
from drl_jax.errors import Interrupted, UserError, out_of_memory_as_user_error
from drl_jax.runtime import cpu_devices, jax_setup, preemption, processes
from drl_jax.tasks import command_line
from drl_jax.tasks.command_line import Command
from drl_jax.tools.plan import chips

log = logging.getLogger("drl_jax")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task and returns the exit status.

    It is 0, or 1 after a `UserError` (printed to stderr as one line), or 128 plus the number of
    the signal that stopped the task. `argv` replaces `sys.argv`.
    """
    argv = sys.argv if argv is None else argv
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    log.setLevel(logging.INFO)
    # Orbax also logs each exception, with its traceback, through absl.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        if text := command_line.help_text(argv, __doc__) or command_line.version_text(argv):
            command_line.show(text)
        else:
            # The first prints log lines above progress bars.
            with logging_redirect_tqdm(), out_of_memory_as_user_error():
                run(command_line.parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        log.info("%s", interrupted)
        return 128 + interrupted.signum
    except KeyboardInterrupt:  # Ctrl-C before the task has begun
        return 130
    return 0


def run(command: Command) -> None:
    """Sets up JAX and the processes of the job, and runs the task, which can raise errors.

    The configuration of a task without a trained model is loaded first, because the number of
    CPU devices depends on it.
    """
    values, task = command.values, command.task
    job = processes.Job(**{name: values[name] for name in processes.Job._fields})
    processes.require_possible(job)
    if not task.distributed:
        job = job._replace(distributed=False)
    if job.has_others and not values["workdir"]:
        raise UserError("several processes need a --workdir that all of them can access")
    config = None
    if not task.trained:
        config = config_lib.load(values["config"]) if values["config"] else config_lib.default()
        config = command_line.changed(config, command.changes)
    topology = values.get("topology")
    with preemption.reporting("nothing new is saved", job.has_others):
        jax_setup.prepare(
            cpu_devices=1 if job.has_others else cpu_devices.count(config),
            environment=chips.parse(topology).environment if topology else {},
        )
        with processes.connected(job):
            if job.has_others:
                processes.require_same(settings(command, config))
                if not processes.is_first():
                    log.setLevel(logging.ERROR)
            run_task(command, config)


def settings(command: Command, config: ConfigDict | None) -> dict[str, object]:
    """Returns the settings that must be equal in all processes of a job, by name."""
    shared = {name: value for name, value in command.values.items() if name != "process_id"}
    if config is None:
        return shared | {"changes of config": list(command.changes)}
    fields = {f"config.{name}": value for name, value in config_lib.flatten(config)}
    return shared | fields | {"config": None}  # hosts may keep the file in different places


def run_task(command: Command, config: ConfigDict | None) -> None:
    """Imports the task's module, which loads JAX, and calls it."""
    module = importlib.import_module(f"drl_jax.tasks.{command.task.name}")
    workdir = command.values["workdir"]
    path = epath.Path(workdir) if workdir else None
    if not command.task.trained:
        if path is None and command.task.creates_workdir:
            name = epath.Path(command.values["config"]).stem
            path = epath.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            log.info("no --workdir given: using %s", path)
        module.run(config=config, workdir=path, **command.arguments)
        return
    from drl_jax.storage import runs

    model = command.values.get("model")
    trained = runs.load(model) if model else runs.load_workdir(path)
    changed = command_line.changed(trained.config, command.changes)
    trained = runs.reconfigure(trained, changed)
    module.run(run=trained, workdir=path, **command.arguments)


if __name__ == "__main__":
    preemption.leave(main())
