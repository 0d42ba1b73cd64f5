"""Callbacks for the trainers that people use; each module imports its trainer's library, nothing else does.

`abyssal.integrations.transformers.Reconstruct` for Hugging Face's `Trainer`, and
`abyssal.integrations.lightning.Reconstruct` for Lightning's; `KernelDrift` in both records how training moves the
tangent kernel. Accelerate and plain loops need no callback:
`abyssal.reconstruct(model)` is all. docs/trainers.md has a few lines for each.
"""
