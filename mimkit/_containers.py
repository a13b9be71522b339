"""Frozen dataclasses registered as pytrees, for `torch.compile`, DDP and export."""

import dataclasses
import json
from typing import Any, TypeVar, dataclass_transform

import torch
from torch.utils import _pytree as pytree

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Declare a dataclass field that belongs to the context of the pytree: not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def container(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass without `__eq__`, registered as a pytree with keys.

    Use it for the outputs of models: with an unregistered output,
    `DistributedDataParallel(static_graph=True)` silently skips the gradient reduction. Fields are
    leaves unless declared with `static`. If the first one is `loss`, an output can be indexed, by a
    field's name or number, as transformers does.

    Args:
        cls: A class with annotated fields.

    Returns:
        The class itself, as a frozen dataclass.

    Raises:
        TypeError: If `cls` is not a class.

    Source:
        mimkit's own, on PyTorch's pytrees.

    Example:
        >>> import torch
        >>> @container
        ... class Output:
        ...     loss: torch.Tensor
        ...     prediction: torch.Tensor
        >>> pytree.tree_map(lambda leaf: leaf * 2, Output(torch.ones(()), torch.ones(3))).prediction
        tensor([2., 2., 2.])
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class; got {cls!r}")
    # Calling `dataclass` on the class keeps its docstring.
    frozen = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(frozen)  # type: ignore[arg-type]
    context_names = tuple(f.name for f in fields if f.metadata.get("static"))
    leaf_names = tuple(f.name for f in fields if f.name not in context_names)

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        leaves = [getattr(value, name) for name in leaf_names]
        return leaves, tuple(getattr(value, name) for name in context_names)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        leaves, context = flatten(value)
        keys = (pytree.GetAttrKey(name) for name in leaf_names)
        return list(zip(keys, leaves, strict=True)), context

    def unflatten(leaves: Any, context: tuple[Any, ...]) -> Any:
        # Without the constructor, which checks its arguments: leaves may be of any kind here.
        value = object.__new__(frozen)
        for name, part in zip(leaf_names + context_names, (*leaves, *context), strict=True):
            object.__setattr__(value, name, part)
        return value

    if leaf_names[:1] == ("loss",):  # transformers' Trainer reads `output["loss"]` or `output[0]`

        def item(value: Any, key: int | str) -> Any:
            return getattr(value, key if isinstance(key, str) else leaf_names[key])

        setattr(frozen, "__getitem__", item)  # noqa: B010 - for mypy

    pytree.register_pytree_node(
        frozen,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        # JSON has lists only; grids and counts are tuples.
        to_dumpable_context=json.dumps,
        from_dumpable_context=lambda text: _as_tuples(json.loads(text)),
    )
    # `torch.load(weights_only=True)` takes it: it is data, and loading it runs no code.
    torch.serialization.add_safe_globals([frozen])
    return frozen


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
