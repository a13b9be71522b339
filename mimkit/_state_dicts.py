"""State dicts as training code saves them: nested in checkpoints, under wrappers' prefixes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

# Under these keys stands the model, beside optimizers and averages.
_MODEL = ("model", "state_dict", "model_state_dict", "module")
# Parts of names that DistributedDataParallel, torch.compile, FSDP and checkpointing add.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_NOT_MODELS = re.compile(r"optim(?!al)|sched|scaler|^opt(_|$)", re.IGNORECASE)


def unwrap(state_dict: Any) -> Mapping[str, Any]:
    """Take the tensors of one model out of a checkpoint, and wrappers' prefixes off their names.

    Example:
        >>> import torch
        >>> list(unwrap({"epoch": 3, "state_dict": {"module._orig_mod.norm.bias": torch.ones(2)}}))
        ['norm.bias']

    Raises:
        TypeError: If it is not a dictionary, or its names are not strings.
        ValueError: If it holds no tensors, the tensors of several models, or itself.
    """
    if not isinstance(state_dict, Mapping):
        kind, advice = type(state_dict).__name__, ""
        if hasattr(state_dict, "state_dict"):
            advice = ": pass its .state_dict()"
        shown = " ".join(repr(state_dict).split())
        raise TypeError(f"a state dict maps names to tensors; got {kind} {shown:.60}{advice}")
    if not state_dict:
        return {}
    found = list(_models(state_dict, (), {}))
    if not found:
        raise ValueError(f"no tensors in a dictionary with the keys {_some(state_dict)}")
    if len(found) > 1:
        keys = list(dict.fromkeys(key for key, _ in found))[:4]
        raise ValueError(f"several state dicts in one dictionary: pass that of {' or '.join(keys)}")
    return _without_wrappers(found[0][1])


def _models(
    outer: Mapping[Any, Any],
    above: tuple[Mapping[Any, Any], ...],
    seen: dict[int, bool],
    key: str = "",
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Find the innermost dictionaries that hold tensors, each with the key it stands under.

    One that stands in several places is looked into once (`seen`: whether it holds tensors): in a
    file of a few lines, 2**50 ways can lead to it.
    """
    if any(outer is other for other in above):
        raise ValueError(f"the dictionary under {key!r} contains itself")
    if id(outer) not in seen:
        found = list(_models_in(outer, (*above, outer), seen, key))
        seen[id(outer)] = bool(found)
        yield from found
    elif seen[id(outer)]:
        yield key, outer


def _models_in(
    outer: Mapping[Any, Any], above: tuple[Mapping[Any, Any], ...], seen: dict[int, bool], key: str
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    sizes = [value.numel() for value in outer.values() if isinstance(value, Tensor)]
    mappings = {str(name): value for name, value in outer.items() if isinstance(value, Mapping)}
    for name in _MODEL:
        found = list(_models(mappings[name], above, seen, name)) if name in mappings else []
        if found:
            yield from found
            return
    if max(sizes, default=0) > 1:
        yield key, outer
        return
    found = [
        model
        for name, inner in mappings.items()
        if not _NOT_MODELS.search(name)
        for model in _models(inner, above, seen, name)
    ]
    # Single numbers beside a model, such as the epoch, are not weights.
    yield from found or ([(key, outer)] if sizes else [])


def _without_wrappers(tensors: Mapping[Any, Any]) -> Mapping[str, Any]:
    bare: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names in a state dict must be strings; got {name!r}")
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in bare:
            raise ValueError(f"two tensors have the name {short!r}, one of them with a prefix")
        bare[short] = tensor
    prefix = "model."
    while bare and all(name.startswith(prefix) for name in bare):
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    return bare


def shared_prefix(names: Iterable[str]) -> str | None:
    """Return the first part of all names, with its dot; `None` if they differ.

    Example:
        >>> shared_prefix(["encoder.norm.bias", "encoder.norm.weight"]), shared_prefix(["norm"])
        ('encoder.', None)
    """
    first = {name.partition(".")[:2] for name in names}
    prefix = "".join(next(iter(first))) if len(first) == 1 else ""
    return prefix if prefix.endswith(".") else None


def _some(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    return f"{listed[:4]}" + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
