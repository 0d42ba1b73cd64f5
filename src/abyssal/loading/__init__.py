"""Models by name, batches that fit them, and sizes in bytes: what the command line takes."""

from abyssal.loading.batches import Example, LoadingError, example_batch
from abyssal.loading.models import LoadedModel, build_from_config, load_builder, load_model
from abyssal.loading.sizes import parse_bytes

__all__ = [
    "Example",
    "LoadedModel",
    "LoadingError",
    "build_from_config",
    "example_batch",
    "load_builder",
    "load_model",
    "parse_bytes",
]
