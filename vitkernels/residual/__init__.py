"""The residual stream that `vitkernels.nn` and `vitkernels.fuse` both stand on.

A Transformer block is a sequence of residual steps, x = x + drop_path(scale(branch(norm(x)))). `stream` runs them, each
add together with the norm behind it; `sublayers` and `parts` compute branches and their pieces with the weights of
other people's modules; `known` holds which classes compute what; `genuine` says when a module must be called instead.
"""
