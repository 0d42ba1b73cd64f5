"""Training without the activation memory: every block's input is restored in the backward pass.

Use it through `abyssal.reconstruct(model, policy)`; `abyssal/__init__.py` lists the public names.
"""
