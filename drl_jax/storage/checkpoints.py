"""Checkpoints of a training run: its state and its configuration, written by Orbax.

Saving is asynchronous and atomic. Each complete checkpoint contains the CRC-32 checksums of its
files, and is read only if they match: a flipped bit would otherwise be restored silently. A
damaged checkpoint is skipped, with a warning, in favour of the one before it.
"""

import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from google.api_core.exceptions import GoogleAPIError
from jax.sharding import Sharding
from jaxtyping import PyTree
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.errors import UserError, as_user_error
from drl_jax.runtime import processes
from drl_jax.storage.atomic import make_writable, write_json

log = logging.getLogger(__name__)

FOLDER = "checkpoints"  # folder of all checkpoints in the work directory
ITEMS = ("state", "config")  # folders in each checkpoint
CONFIG = "config.json"  # file in the work directory with the newest checkpoint's configuration
CHECKSUMS = "crc32.json"  # file beside these folders, with the checksums of their files
DAMAGED = "damaged"  # suffix of the name of a damaged checkpoint
# Characters of a path that Orbax and TensorStore take for patterns: they write checkpoints that
# they cannot read, or touch those of other folders.
UNUSABLE = "[]\\*?"
BLOCK = 2**24  # number of bytes of a file that are read at a time for its checksum


class Checkpoints:
    """The checkpoints of one work directory.

    Used as a context manager: leaving the context waits until everything is written.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict | None = None):
        """Opens the folder.

        Args:
          workdir: the work directory.
          config: configuration of the run, saved in each checkpoint; `config.checkpoint` says
            which checkpoints are kept. None opens the folder for reading only.

        Raises:
          UserError: as `require_usable` does.
        """
        require_usable(workdir)
        if config is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False
            )
        else:
            policies = ocp.checkpoint_managers
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(config.checkpoint.keep_last),
                        policies.EveryNSteps(config.checkpoint.keep_every_steps),
                    ]
                ),
                cleanup_tmp_directories=True,
                create=False,  # not supported together with active_processes
                # With them, processes wait for each other by JAX's coordination service, not
                # by a collective operation, which would run beside those of a training step.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count()))
                ),
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._complete,
                    # Otherwise a folder that cannot be created blocks a thread for minutes.
                    create_directories_asynchronously=False,
                ),
            )
        self._workdir = workdir
        folder = workdir / FOLDER
        # Orbax requires an absolute path; for etils, addresses such as gs:// are absolute.
        self._folder = folder if folder.is_absolute() else folder.absolute()
        self._config = config
        self._saving: int | None = None
        if config is not None:
            with as_user_error(f"cannot write to {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
        with _without_warnings():  # that a folder opened for reading is read-only
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, handler_registry=_handlers()
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._manager.close()

    def save(self, step: int, state: PyTree) -> None:
        """Starts writing the state as the checkpoint of a step, unless there is one already.

        Args:
          step: number of training steps made.
          state: pytree of arrays on the devices.

        Raises:
          UserError: if this checkpoint or the one before it cannot be written. The next call of
            `save` or `wait`, or the end of the context, raises failures in the background.
        """
        if step in self._manager.all_steps():
            return
        self.wait()  # until the checksums of the one before are written
        with self._writing():
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    config=ocp.args.JsonSave(config_lib.to_json(self._config)),
                ),
            )

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: if a checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Re-raises failures of writes, including earlier ones in the background.

        Raises:
          UserError: for every failure of the disk, the bucket or TensorStore.
        """
        try:
            yield
        # Disks raise OSError, buckets GoogleAPIError, and TensorStore only ValueError.
        except (OSError, ValueError, GoogleAPIError) as error:
            # The message is a chain of reasons that repeats the path; the last two suffice.
            reason = ": ".join(str(error).split(": ")[-2:])
            raise UserError(f"cannot write checkpoints to {self._folder}: {reason}") from error

    def restore(
        self,
        abstract: Callable[[ConfigDict], PyTree],
        sharding: Callable[[tuple[int, ...]], Sharding],
        only: int | None = None,
    ) -> tuple[ConfigDict, Any] | None:
        """Returns (config, state) of the newest undamaged checkpoint, None if there is none.

        Args:
          abstract: configuration of the checkpoint -> `jax.ShapeDtypeStruct`s of its state. If
            it returns a dict of some fields of the state, only these are restored. May raise
            `UserError` to reject the configuration.
          sharding: shape of an array -> its sharding.
          only: step of the checkpoint to restore, instead of the newest undamaged one.

        Raises:
          UserError: if all checkpoints are damaged, there is none of the step `only`, or the
            arrays do not have the shapes that `abstract` returns.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if only is not None:
            if only not in steps:
                raise UserError(
                    f"there is no checkpoint of step {only} in {self._folder}: the steps are "
                    f"{', '.join(map(str, steps)) or 'none'}"
                )
            steps = [only]
        faults: dict[int, str] = {}
        for step in steps:
            is_first = jax.process_index() == 0
            fault = processes.broadcast_from_first(
                find_fault(self._folder / str(step)) if is_first else None
            )
            if not fault:
                restored = self._read(step, abstract, sharding)
                for damaged, reason in faults.items():
                    log.warning(
                        "checkpoint of step %d is damaged (%s): using that of step %d",
                        damaged,
                        reason,
                        step,
                    )
                self._set_aside(faults)
                return restored
            faults[step] = fault
        if faults:
            newest = max(faults)
            raise UserError(
                f"every checkpoint in {self._folder} is damaged (step {newest}: "
                f"{faults[newest]}): replace one with a copy, or train in a new --workdir"
            )
        return None

    def _read(
        self,
        step: int,
        abstract: Callable[[ConfigDict], PyTree],
        sharding: Callable[[tuple[int, ...]], Sharding],
    ) -> tuple[ConfigDict, Any]:
        """Returns (config, state) of an undamaged checkpoint."""
        config_args = ocp.args.Composite(config=ocp.args.JsonRestore())
        config = config_lib.from_json(self._manager.restore(step, args=config_args)["config"])
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(a.shape)),
            abstract(config),
        )
        saved = self._manager.item_metadata(step)["state"].tree
        fields = target.keys() & saved.keys() if isinstance(target, dict) else saved.keys()
        if _shapes(target) != _shapes({name: saved[name] for name in fields}):
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} does not fit the network of "
                "its config: use the version of this program that wrote it, or train in a new "
                "--workdir"
            )
        if isinstance(target, dict):
            others = {name: saved[name] for name in saved.keys() - fields}
            target |= jax.tree.map(lambda _: ocp.PLACEHOLDER, others)  # Orbax skips these
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        state = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        return config, {n: state[n] for n in fields} if isinstance(target, dict) else state

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Renames damaged checkpoints, so that their steps can be written again."""
        if self._config is None or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                renamed = self._folder / f"{step}.{DAMAGED}"
                if renamed.exists():
                    renamed.rmtree()
                (self._folder / str(step)).rename(renamed)
        processes.broadcast_from_first(None)  # makes the other processes wait for the renaming
        self._manager.reload()

    def write_config(self) -> None:
        """Writes config.json to the work directory: the configuration of the checkpoints.

        This also happens whenever a checkpoint is complete, so call it only for a new run.

        Raises:
          UserError: if the file cannot be written.
        """
        write_json(self._workdir / CONFIG, config_lib.to_json(self._config))

    def _complete(self) -> None:
        """Adds checksums; Orbax's thread calls this after writing, before the final rename."""
        if jax.process_index():
            return
        for folder in self._folder.iterdir():
            name, _, suffix = folder.name.partition(".")  # Orbax adds a suffix until the rename
            if name == str(self._saving) and suffix != DAMAGED:
                (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
        try:
            self.write_config()
        except UserError as error:  # the checkpoint has the configuration, too
            log.warning("%s", error)


def require_usable(workdir: epath.Path) -> None:
    """Raises unless checkpoints can be written to and read from a work directory.

    Orbax cannot if its absolute path has one of the characters `UNUSABLE`, or is not UTF-8.

    Raises:
      UserError: naming the characters.
    """
    path = (workdir if workdir.is_absolute() else workdir.absolute()).as_posix()
    wrong = [character for character in UNUSABLE if character in path]
    wrong += sorted({character for character in path if "\ud800" <= character <= "\udfff"})
    if wrong:
        raise UserError(
            f"checkpoints cannot be kept in {path!r}, because its path contains "
            f"{' and '.join(map(repr, wrong))}: rename the folder, or give another --workdir"
        )


def require_none(workdir: epath.Path) -> None:
    """Raises unless a work directory can have checkpoints and has none.

    Raises:
      UserError: as `require_usable` does, or if there are checkpoints.
    """
    require_usable(workdir)
    folder = workdir / FOLDER
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{workdir} already holds checkpoints: give another --workdir")


def save_first(workdir: epath.Path, config: ConfigDict, step: int, state: PyTree) -> None:
    """Makes a work directory and saves a state as its first checkpoint.

    Raises:
      UserError: if the folder cannot be written to.
    """
    make_writable(workdir)
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(step, state)


def exist(workdir: epath.Path) -> bool:
    """Returns whether a work directory has checkpoints, damaged or not.

    Raises:
      UserError: if the folder cannot be read.
    """
    folder = workdir / FOLDER
    with as_user_error(f"cannot read {workdir}"):
        return folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())


def checksums(folder: epath.Path) -> dict[str, int]:
    """Returns the CRC-32 of every file of a checkpoint's items, by relative path."""
    return {
        (parent / file).relative_to(folder).as_posix(): _crc32(parent / file)
        for item in ITEMS
        for parent, _, files in (folder / item).walk()
        for file in files
    }


def find_fault(folder: epath.Path) -> str | None:
    """Returns a description of damage to the files of a checkpoint, None if there is none."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        found = checksums(folder)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} is missing or unreadable: {error}"
    if not isinstance(expected, dict) or not expected:
        return f"{CHECKSUMS} contains no checksums"
    wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
    return f"{wrong[0]} is missing or altered" if wrong else None


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all arrays by their path, for any kind of container."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(array.shape)
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }


def _crc32(file: epath.Path) -> int:
    """Returns the CRC-32 of a file, reading it in blocks."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences Orbax's warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Returns which of Orbax's handlers writes and reads each item."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, config = ocp.handlers.PyTreeCheckpointHandler(), ocp.handlers.JsonCheckpointHandler()
    registry.add("state", ocp.args.PyTreeSave, state)
    registry.add("state", ocp.args.PyTreeRestore, state)
    registry.add("config", ocp.args.JsonSave, config)
    registry.add("config", ocp.args.JsonRestore, config)
    return registry
