"""Markov chains on a log-density, many side by side.

Each sampler is a module with two pure functions,

    init(position) -> State
    kernel(keys, state, log_density_fn, step_size, ...) -> (State, Info)

and two NamedTuples. A position is [B, ...], B independent chains; `log_density_fn` maps
it to [B]; keys and step sizes are [B], one a chain. A kernel makes one step. It never
loops and never knows a network, a configuration or a device.
"""
