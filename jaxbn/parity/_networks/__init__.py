"""Run networks of different frameworks, and record what their submodules return.

`network` defines what the parity tools ask of a network. `make` finds the file for a framework:
`linen`, `nnx` and `keras`, which share `jax_network`, and `torch`. `layers` describes a layer by
its kind and its shape, in the same words for all frameworks.
"""
