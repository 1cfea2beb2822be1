"""What a run does: a module a mode, each a short program over the pure functions.

`run` takes the flags that `main` has for the mode, by their names.
"""
