"""Markov chain Monte Carlo kernels for a batch of independent chains.

Each algorithm is a module with two pure functions:

    init(position, log_density_fn) -> State
    kernel(keys, state, log_density_fn, step_size, ...) -> (State, Info)

Positions have the shape [B, ...]: B independent chains. `log_density_fn` maps positions to B
log-densities [nats], each a function of its own chain's position only. Keys and all tuning
parameters are [B], one per chain. Every State has a field `position`, and every Info a field
`acceptance` [B], the acceptance probability of the step.

A kernel makes one step of every chain. It contains no loop over steps, and no network,
configuration or device.
"""
