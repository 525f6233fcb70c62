"""`pmf.jvp`: the tangent of any network beside its value, by a rule for every function that the network calls.

`carriers` make a value with its tangent look like a tensor, also one that is `at_rest`; `handlers` run a function on
them, `arguments` takes them apart, and `memory` says how tangents lie; `rules` is the registry that the other modules
fill: `shapes`, `products`, `pointwise`, `norms`, `attention`, `recurrent`, `places`, `in_place` and `operators`. What
has no rule goes to `fallback`. `flex_attention`, `packages` and `formulas` have the rules of FlexAttention and of other
packages, `queries` has what only asks; `bodies` and `random_state` serve functions that PyTorch writes in Python and
those that draw numbers. `wrappers` and `interception` let checkpointing, DDP and FSDP2 see only values,
`tracing` lets compilers take carriers for tensors. `call` has `jvp` itself.
"""
