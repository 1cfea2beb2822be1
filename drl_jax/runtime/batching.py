"""Runs a program over any number of examples, in batches shared by all devices."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from drl_jax.runtime import sharding
from drl_jax.runtime.matmul_precision import full_precision

# (shared, examples) -> results. `shared` is a pytree that is replicated on all devices; the
# arrays of the other two pytrees have the examples along their first axis, [B, ...].
Program = Callable[[Any, Any], Any]


class Engine:
    """Pads batches of examples, splits them over the devices, and runs programs on them.

    Attributes:
      mesh: devices that share each batch.
      batch_size: largest number of examples per batch, a multiple of the number of devices.
    """

    def __init__(self, mesh: Mesh, batch_size: int = 256):
        """Rounds `batch_size` up to a multiple of the number of devices."""
        self.mesh = mesh
        self.batch_size = _round_up(batch_size, mesh.size)

    def compile(self, program: Program) -> Program:
        """Returns the program jitted, mapped over the devices, and in full precision.

        Each device runs it on its own share of the examples, so the program must treat every
        example independently of the others.
        """
        replicated, split = sharding.replicated(self.mesh), sharding.by_example(self.mesh)
        return jax.jit(
            full_precision(sharding.over_examples(program, self.mesh)),
            in_shardings=(replicated, split),
            out_shardings=split,
        )

    def run(
        self, compiled: Program, shared: PyTree, batches: Iterable[PyTree], size: int = 0
    ) -> Iterator[PyTree]:
        """Yields the results for each batch, as numpy arrays.

        While the caller uses the results of one batch, the devices compute the next one. All
        batches are padded to the same size (`size`, or that of the first, rounded up to a
        multiple of the number of devices), so that the program is compiled once. Padding
        repeats the last example of a batch; its results are dropped.

        Args:
          compiled: program returned by `compile`.
          shared: its first argument, the same for all batches.
          batches: pytrees of numpy arrays [n, ...] of n examples; n is at most that of the
            first batch. If it is 0, the results are arrays [0, ...], and nothing is compiled.
          size: number of examples to which batches are padded; 0: that of the first batch.
        """
        split = sharding.by_example(self.mesh)

        def start(batch: PyTree) -> tuple[int, Any]:
            nonlocal size
            n = _length(batch)
            if not n:
                return 0, self._no_results(compiled, shared, batch)
            size = size or _round_up(n, self.mesh.size)
            if n < size:
                rows = np.minimum(np.arange(size), n - 1)
                batch = jax.tree.map(lambda array: array[rows], batch)
            return n, compiled(shared, sharding.place(batch, split))

        started = map(start, batches)
        pending = next(started, None)
        while pending:
            (n, results), pending = pending, next(started, None)
            yield jax.tree.map(lambda array, n=n: array[:n], sharding.fetch(results))

    def split(self, arrays: PyTree) -> Iterator[PyTree]:
        """Yields a pytree of arrays [n, ...] in batches of at most `batch_size` rows.

        If n is 0, it yields one batch without rows.
        """
        for start in range(0, max(1, _length(arrays)), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield jax.tree.map(lambda array, rows=rows: array[rows], arrays)

    def stack(self, examples: Iterable[PyTree]) -> Iterator[PyTree]:
        """Yields examples stacked into batches; only one batch is in memory at a time."""
        examples = iter(examples)
        while batch := list(itertools.islice(examples, self.batch_size)):
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *batch)

    def _no_results(self, compiled: Program, shared: PyTree, batch: PyTree) -> PyTree:
        """Returns the results of a program for a batch of no examples, arrays [0, ...]."""
        examples = jax.tree.map(
            lambda array: np.zeros((self.mesh.size, *array.shape[1:]), array.dtype), batch
        )
        return jax.tree.map(
            lambda leaf: np.zeros((0, *leaf.shape[1:]), leaf.dtype),
            jax.eval_shape(compiled, shared, examples),
        )


def _length(arrays: PyTree) -> int:
    """Returns the length of the first axis, which is the same for all arrays of a pytree."""
    return len(jax.tree.leaves(arrays)[0])


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
