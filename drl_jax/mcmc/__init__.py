"""Markov chains on a log-density, many side by side.

Each sampler is a module with two pure functions,

    init(position, log_density_fn) -> State
    kernel(keys, state, log_density_fn, step_size, ...) -> (State, Info)

A position is [B, ...], B independent chains; `log_density_fn` maps it to [B]; keys and all
that follows the log-density are [B], one a chain. A State has a `position`; an Info has the
`acceptance` probability [B] of the step. A kernel makes one step. It never loops over steps
and never knows a network, a configuration or a device.
"""
