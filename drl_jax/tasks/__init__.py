"""The tasks of `drl_jax.main`, one module per --mode, each with a function `run`.

`run` takes keyword arguments: `workdir`; the trained `run` or the `config`, which `main` has
loaded; and the flags of the task, as `tasks.table` lists them.
"""
