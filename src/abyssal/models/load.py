"""Models by name, as the command line takes them: `hf:DIR`, `timm:NAME`, `torchvision:NAME`, `path.py:factory`.

Nothing is ever downloaded: a Hugging Face name that is not a directory is looked up in the local cache only. A
model can be built empty, on the meta device, where it has shapes and no memory.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from abyssal.models.batches import Example, LoadingError, example_batch
from abyssal.models.torchvision import import_torchvision
from abyssal.util.source import function_named, run_source

__all__ = ["LoadedModel", "build_from_config", "load_builder", "load_model"]

_FORMS = "hf:DIR (a folder with config.json), timm:NAME, torchvision:NAME or path/to/file.py:factory"


@dataclass(frozen=True)
class LoadedModel:
    """A model that was loaded by its spec.

    Attributes:
        model: the module; on the meta device if it was asked for empty.
        name: the spec it was loaded by.
        own: the batch and loss that a `path.py:factory` gave with its model, if any.
        note: what is worth telling the user, in words.
    """

    model: nn.Module
    name: str
    own: Example | None = None
    note: str = ""

    def example_batch(
        self, batch_size: int = 1, tokens: int | None = None, image_size: int | None = None, seed: int = 0
    ) -> Example:
        """Return the factory's own batch, if it gave one, else what `example_batch` makes."""
        if self.own is not None:
            return self.own
        return example_batch(self.model, batch_size, tokens, image_size, seed)


def load_model(
    spec: str,
    *,
    empty: bool = False,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    **overrides: Any,
) -> LoadedModel:
    """Load a model by its spec.

    Args:
        spec: `hf:DIR`, a directory with a `config.json` (and weights: they are loaded if they are there, else the
            model gets random ones), the path of a `config.json`, or a name in the local Hugging Face cache;
            `timm:NAME`; `torchvision:NAME`; or `path.py:factory`, a file and a function in it that returns an
            `nn.Module`, or `(model, batch)`, or `(model, batch, loss)`.
        empty: build it on the meta device: no weights are allocated, none are read.
        dtype: of the parameters; None for the library's default.
        image_size: for vision models whose size is part of the model.
        overrides: entries of the configuration (`hf:`), or keyword arguments of the model's function.

    Returns:
        The model, in training mode, with its name.

    Raises:
        LoadingError: if the spec is not understood, a package is missing, or nothing of that name is there.
    """
    prefix, _, rest = spec.partition(":")
    if not rest or prefix not in _LOADERS:
        if ".py:" in spec:
            return _from_file(spec, empty, dtype, overrides)
        raise LoadingError(_unknown_spec_message(spec, prefix, rest))
    model = _LOADERS[prefix](rest, empty, dtype, image_size, overrides)
    return LoadedModel(model.train(), spec)


def _on(empty: bool) -> AbstractContextManager[Any]:
    return torch.device("meta") if empty else nullcontext()


def _cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return model if dtype is None else model.to(dtype)


def _unknown_spec_message(spec: str, prefix: str, rest: str) -> str:
    if Path(spec).exists():
        kind = "hf:" + spec if Path(spec).is_dir() or spec.endswith(".json") else f"{spec}:FUNCTION"
        return f"model {spec!r}: say what kind it is: {kind}. A model is given as {_FORMS}."
    if not rest:
        return f"model {spec!r}: expected a prefix and a name. A model is given as {_FORMS}."
    return f"model {spec!r}: {prefix!r} is no kind of model known here. A model is given as {_FORMS}."


# ---------------------------------------------------------------------- Hugging Face


def _transformers(why: str) -> ModuleType:
    _need("transformers", "hf", why)
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    import transformers

    return transformers


def _need(package: str, extra: str, why: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise LoadingError(f'{why}: the package {package} is not installed: pip install "abyssal[{extra}]"')


def _from_hub(
    name: str, empty: bool, dtype: torch.dtype | None, image_size: int | None, overrides: dict[str, Any]
) -> nn.Module:
    transformers = _transformers(f"model 'hf:{name}'")
    path = Path(name)
    folder = path.parent if path.name == "config.json" and path.is_file() else path
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise LoadingError(f"model 'hf:{name}': the directory {str(folder)!r} has no config.json")
    source = str(folder) if folder.is_dir() else name
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception as error:
        if folder.is_dir():
            first = str(error).strip().splitlines()[0]
            raise LoadingError(f"model 'hf:{name}': its config.json cannot be read: {first}") from error
        raise LoadingError(
            f"model 'hf:{name}': no such directory, and no model of that name is in the local Hugging Face cache. "
            "Nothing is downloaded here: give a directory with a config.json, or download the model first "
            f"(hf download {name})."
        ) from error
    overrides = dict(overrides)
    if image_size is not None and hasattr(config, "image_size"):
        overrides.setdefault("image_size", image_size)
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise LoadingError(f"model 'hf:{name}': its configuration ({type(config).__name__}) has no entry {key!r}")
        setattr(config, key, value)
    weights = path.name != "config.json" and (not folder.is_dir() or _has_weights(folder))
    if empty or overrides or not weights:
        return build_from_config(config, empty=empty, dtype=dtype)
    kind = _class_for(config, transformers)
    options = {} if dtype is None else {"dtype": dtype}
    try:
        model: nn.Module = kind.from_pretrained(source, config=config, local_files_only=True, **options)
    except OSError:  # a cache with a configuration and no weights
        return build_from_config(config, empty=False, dtype=dtype)
    return model


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def build_from_config(config: Any, *, empty: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the model that a transformers configuration describes, with random weights.

    Args:
        config: a `PretrainedConfig`. Its `architectures` decide on the class if they name one with a head;
            else the first task that the configuration's type knows: sequence to sequence, masked or causal
            language modelling, image classification.
        empty: build it on the meta device.
        dtype: of the parameters; default: the configuration's own, or float32.

    Raises:
        LoadingError: if there is no such class.
    """
    transformers = _transformers(f"a model from {type(config).__name__}")
    kind = _class_for(config, transformers)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    present = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _on(empty):
            model: nn.Module = kind(config)
    finally:
        torch.set_default_dtype(present)
    return model.train()


_HEADS = re.compile(r"(LMHeadModel|For[A-Z]\w*)$")
_TASKS = ("MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING")


def _class_for(config: Any, transformers: ModuleType) -> Any:
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if kind is not None and _HEADS.search(name):
            return kind
    tasks = (
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",) if getattr(config, "is_encoder_decoder", False) else ()
    ) + _TASKS
    for task in tasks:
        kinds = getattr(transformers, task).get(type(config), None)
        if kinds is not None:
            return kinds[0] if isinstance(kinds, tuple | list) else kinds
    raise LoadingError(
        f"{type(config).__name__} (model type {getattr(config, 'model_type', '?')!r}): no model with a head for "
        "language modelling or image classification is known for it. Write a file with a function that returns "
        "(model, batch, loss), and give its path.py:function."
    )


# ---------------------------------------------------------------------- timm, torchvision, files


def _from_timm(
    name: str, empty: bool, dtype: torch.dtype | None, image_size: int | None, overrides: dict[str, Any]
) -> nn.Module:
    _need("timm", "vision", f"model 'timm:{name}'")
    _need("torchvision", "vision", f"model 'timm:{name}'")
    import_torchvision()
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise LoadingError(f"model 'timm:{name}': timm has no model of that name.{_near(name, timm.list_models())}")
    with _on(empty):
        if image_size is not None and "img_size" not in overrides:
            try:
                return _cast(timm.create_model(name, img_size=image_size, **overrides), dtype)
            except TypeError:  # convolutional networks take any size, and no such argument
                pass
        return _cast(timm.create_model(name, **overrides), dtype)


def _from_torchvision(
    name: str, empty: bool, dtype: torch.dtype | None, image_size: int | None, overrides: dict[str, Any]
) -> nn.Module:
    _need("torchvision", "vision", f"model 'torchvision:{name}'")
    models = import_torchvision().models
    if name not in models.list_models():
        raise LoadingError(
            f"model 'torchvision:{name}': torchvision has no model of that name.{_near(name, models.list_models())}"
        )
    if image_size is not None and name.startswith("vit_"):
        overrides = {"image_size": image_size, **overrides}
    with _on(empty), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of googlenet's and inception's initialisation
        return _cast(models.get_model(name, **overrides), dtype)


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f" Near it: {', '.join(near)}." if near else ""


_LOADERS: dict[str, Callable[[str, bool, torch.dtype | None, int | None, dict[str, Any]], nn.Module]] = {
    "hf": _from_hub,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}


def load_builder(spec: str) -> Callable[[int], LoadedModel]:
    """Load a function that builds a model of any depth.

    Args:
        spec: `path.py:build`, a file and a function of the depth in it, which returns an `nn.Module`, or
            `(model, batch)`, or `(model, batch, loss)`. The file is run once.

    Returns:
        A function of the depth; it raises LoadingError where the file's function fails.

    Raises:
        LoadingError: for another spec, a file that fails, or one without that function.
    """
    if ".py:" not in spec:
        raise LoadingError(f"model {spec!r}: expected path/to/file.py:build, a function of the depth")
    name = spec.rpartition(":")[2]
    function = _function_of(spec)

    def build(depth: int) -> LoadedModel:
        try:
            made = function(depth)
        except (Exception, SystemExit) as error:
            raise LoadingError(f"model {spec!r}: {name}({depth}) failed: {type(error).__name__}: {error}") from error
        model, own = _taken_apart(made, f"model {spec!r}: {name}({depth})")
        return LoadedModel(model.train(), spec, own)

    return build


def _function_of(spec: str) -> Callable[..., Any]:
    """Run the file of a spec and return the function it names."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise LoadingError(f"model {spec!r}: there is no file {file!r}")
    try:
        module = run_source(f"_abyssal_model_{path.stem}", path, path.read_text(encoding="utf-8"), path_stays=False)
    except (Exception, SystemExit) as error:
        raise LoadingError(f"model {spec!r}: {path} failed when run: {type(error).__name__}: {error}") from error
    try:
        return function_named(name, module)
    except LookupError as error:
        raise LoadingError(f"model {spec!r}: {file} has no function {name!r} that could be called. {error}") from None


def _from_file(spec: str, empty: bool, dtype: torch.dtype | None, overrides: dict[str, Any]) -> LoadedModel:
    name = spec.rpartition(":")[2]
    factory = _function_of(spec)
    note = ""
    try:
        with _on(empty):
            made = factory(**overrides)
    except (Exception, SystemExit) as error:
        if not empty:
            raise LoadingError(f"model {spec!r}: {name}() failed: {type(error).__name__}: {error}") from error
        note = f"{name}() does not run on the meta device ({type(error).__name__}), so its model was built for real"
        try:
            made = factory(**overrides)
        except (Exception, SystemExit) as second:
            raise LoadingError(f"model {spec!r}: {name}() failed: {type(second).__name__}: {second}") from second
    model, own = _taken_apart(made, f"model {spec!r}: {name}()")
    return LoadedModel(_cast(model, dtype).train(), spec, own, note)


def _taken_apart(made: Any, who: str) -> tuple[nn.Module, Example | None]:
    """Take what a factory returned as (model, example)."""
    parts = made if isinstance(made, tuple) else (made,)
    model, batch, loss = (*parts, None, None)[:3] if len(parts) <= 3 else (None, None, None)
    if not isinstance(model, nn.Module) or not (loss is None or callable(loss)):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise LoadingError(
            f"{who} returned {f'({kinds})' if isinstance(made, tuple) else kinds}; expected an nn.Module, or "
            "(model, batch), or (model, batch, loss), where loss takes the model's output to a scalar"
        )
    return model, None if batch is None else Example(batch, loss, "the batch of the file")
