"""Rules that translate parameter names; they apply to any subset of a state dict.

In a pattern, `{i}` and `{j}` match a number and `{rest}` the rest of a name. The first rule that
matches is used. No rule changes a value, so that rules also translate gradients.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mimkit.nn import ViT


class Converted(dict[str, Tensor]):
    """A converted state dict that also lists what was dropped and added.

    Args:
        tensors: Name -> tensor.

    Attributes:
        dropped: Names of the input that have no counterpart.
        filled: Names of the result that the input had not. They are zero (the weight of a norm and
            layer scale: one), or copies of a table of relative positions that blocks share.
        config: What to build the model with that these weights are for, where it is known: the
            keyword arguments of its class.

    Source:
        mimkit's own.

    Example:
        >>> converted = Converted({"cls_token": torch.zeros(1, 1, 8)}, dropped=("mask_token",))
        >>> list(converted), converted.dropped, converted.filled
        (['cls_token'], ('mask_token',), ())
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dropped: tuple[str, ...],
        *,
        filled: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.dropped = dropped
        self.filled = filled
        self.config = config


@dataclass(frozen=True)
class Rule:
    """Translation of one pattern of names.

    Attributes:
        theirs: Pattern of the authors' names.
        ours: Pattern of mimkit's names; `None` drops them.
        is_pointwise: Whether the authors' tensor is the weight of a 1x1 convolution and ours that
            of a linear layer, which has two axes less.
        part: Where the authors' tensor stands in ours, if ours is several of theirs concatenated
            along the first axis: its number, and how many there are.
    """

    theirs: str
    ours: str | None
    is_pointwise: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Translation:
    """The rules of one method.

    Attributes:
        rules: The rules, in the order in which they are tried.
        encoder_of: Selects the encoder of a pre-training checkpoint: takes the checkpoint's names,
            returns fine-tuning name -> name in the checkpoint. The identity for other checkpoints.
        left_out: Patterns of the authors' names that are known and dropped.
        ours_left_out: The same of mimkit's names.
        table_per_block: Whether each of their blocks has a table of relative positions of its own,
            so that one that all of ours share is copied to every block.
    """

    rules: tuple[Rule, ...]
    encoder_of: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {n: n for n in names}
    left_out: tuple[str, ...] = ()
    ours_left_out: tuple[str, ...] = ()
    table_per_block: bool = False

    def to_ours(self, tensors: Mapping[str, Any]) -> Converted:
        """Convert the authors' tensors to mimkit's.

        Raises:
            ValueError: If a tensor of ours has only some of its parts, or parts of unequal shapes.
        """
        converted: dict[str, Tensor] = {}
        parts: dict[str, list[str | None]] = {}
        used = set()
        entries = [(rule, rule.theirs, rule.ours) for rule in self.rules]
        for name, source in self.encoder_of(tensors).items():
            rule, new = translate(name, entries)
            tensor = tensors[source]
            if rule is None or new is None or not isinstance(tensor, Tensor):
                continue
            used.add(source)
            if rule.part is None:
                converted[new] = tensor.flatten(1) if rule.is_pointwise else tensor
            else:
                converted[new] = tensor  # keeps its place in the order
                index, count = rule.part
                parts.setdefault(new, [None] * count)[index] = source
        for name, sources in parts.items():
            converted[name] = _join(name, sources, tensors)
        return Converted(converted, tuple(name for name in tensors if name not in used))

    def to_theirs(self, tensors: Mapping[str, Any]) -> Converted:
        """Convert mimkit's tensors to the authors': the inverse of `to_ours`."""
        swapped = [(rule, rule.ours, rule.theirs) for rule in self.rules if rule.ours is not None]
        swapped.sort(key=lambda entry: entry[1] == "{rest}")  # the catch-all pattern comes last
        converted: dict[str, Tensor] = {}
        dropped = []
        copies = _copied_tables(tensors) if self.table_per_block else {}
        for name, tensor in {**tensors, **copies}.items():
            found = [] if not isinstance(tensor, Tensor) else list(matches(name, swapped))
            if not found:
                dropped.append(name)
            elif found[0][0].part is None:
                rule, new = found[0]
                converted[new] = tensor[..., None, None] if rule.is_pointwise else tensor
            elif tensor.ndim == 0 or tensor.shape[0] % found[0][0].part[1]:
                raise ValueError(
                    f"{name!r} is {found[0][0].part[1]} tensors of one shape, joined; got "
                    f"{list(tensor.shape)}"
                )
            else:
                for rule, new in found:
                    if rule.part is not None and new not in converted:
                        converted[new] = tensor.chunk(rule.part[1])[rule.part[0]]
        filled = (new for name in copies for _, new in matches(name, swapped))
        return Converted(converted, tuple(dropped), filled=tuple(filled))

    def unknown(self, tensors: Mapping[str, Any], *, ours: bool = False) -> list[str]:
        """Return the names of the tensors that no rule knows; `ours` for mimkit's names."""
        if ours:
            patterns = (*(rule.ours for rule in self.rules if rule.ours), *self.ours_left_out)
            names: Mapping[str, str] = {}
        else:
            patterns = (*(rule.theirs for rule in self.rules), *self.left_out)
            names = self.encoder_of(tensors)
        is_known = _any_of(patterns).fullmatch
        known = {source for name, source in names.items() if is_known(name)}
        return [
            name
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor) and name not in known and not is_known(name)
        ]


# A block that has these is whole. A part of a state dict does not show whether tables are shared.
_WHOLE_BLOCK = frozenset(
    f"{layer}.weight" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
)


def _copied_tables(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of a table that all blocks share, one for each block after the first."""
    shared = tensors.get("rel_pos_bias.0.table")
    if shared is None or "rel_pos_bias.1.table" in tensors:
        return {}
    blocks: dict[str, set[str]] = {}
    for name in tensors:
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            blocks.setdefault(found[1], set()).add(found[2])
    if not all(names >= _WHOLE_BLOCK for names in blocks.values()):
        return {}
    return {
        f"rel_pos_bias.{block}.table": shared for block in sorted(blocks.keys() - {"0"}, key=int)
    }


def _join(name: str, sources: Sequence[str | None], tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate the tensors that are one of ours; a missing one has no value to stand for it."""
    found = {source: tuple(tensors[source].shape) for source in sources if source is not None}
    shapes = set(found.values())
    if len(found) < len(sources) or len(shapes) > 1 or () in shapes:
        raise ValueError(
            f"{name!r} is {len(sources)} tensors of one shape, joined; got "
            + " and ".join(f"{source!r} {list(shape)}" for source, shape in found.items())
        )
    return torch.cat([tensors[source] for source in found])


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.sub(r"\?P<\w+>", "?:", _expression(p).pattern) for p in patterns))


def renames(*pairs: tuple[str, str | None]) -> tuple[Rule, ...]:
    """Make rules from (official, mimkit) pairs of patterns."""
    return tuple(Rule(theirs, ours) for theirs, ours in pairs)


def same(*patterns: str) -> tuple[Rule, ...]:
    """Make rules for names that are the same in both."""
    return tuple(Rule(pattern, pattern) for pattern in patterns)


def within(rules: Iterable[Rule], *, theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Add a prefix to each side's patterns."""
    return tuple(
        replace(
            rule,
            theirs=theirs + rule.theirs,
            ours=None if rule.ours is None else ours + rule.ours,
        )
        for rule in rules
    )


def joined(theirs: Sequence[str], ours: str) -> tuple[Rule, ...]:
    """Make rules for tensors of theirs that are one tensor of ours, along the first axis."""
    count = len(theirs)
    return tuple(Rule(name, ours, part=(index, count)) for index, name in enumerate(theirs))


# A Vision Transformer under the names that timm, MAE, BEiT, CAE and mimkit share.
BLOCK = same(
    "norm1.{rest}", "norm2.{rest}", "attn.qkv.{rest}", "attn.proj.{rest}", "attn.q_bias",
    "attn.v_bias", "mlp.fc1.{rest}", "mlp.fc2.{rest}", "gamma_1", "gamma_2",
)  # fmt: skip
VIT = (
    *same("cls_token", "pos_embed", "patch_embed.proj.{rest}", "norm.{rest}"),
    *within(BLOCK, theirs="blocks.{i}.", ours="blocks.{i}."),
)


def translate(
    name: str, entries: Iterable[tuple[Rule, str, str | None]]
) -> tuple[Rule | None, str | None]:
    """Apply the first (rule, old pattern, new pattern) that matches; return rule and new name."""
    for rule, old, new in entries:
        match = _expression(old).fullmatch(name)
        if match:
            return rule, None if new is None else new.format(**match.groupdict())
    return None, None


def matches(name: str, entries: Iterable[tuple[Rule, str, str]]) -> Iterator[tuple[Rule, str]]:
    """Yield rule and new name of every entry that matches."""
    for rule, old, new in entries:
        match = _expression(old).fullmatch(name)
        if match:
            yield rule, new.format(**match.groupdict())


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for number in "ij":
        expression = expression.replace(rf"\{{{number}\}}", rf"(?P<{number}>\d+)")
    return re.compile(expression.replace(r"\{rest\}", r"(?P<rest>.+)"))


def state_of(model_or_state: nn.Module | Mapping[str, Any], function: str) -> Mapping[str, Any]:
    """Return the weights of a model, or those that were given.

    Raises:
        ValueError: If it is a `ViT` with attention windows, which no weight shows.
    """
    if not isinstance(model_or_state, nn.Module):
        return model_or_state
    if isinstance(model_or_state, ViT) and model_or_state.window is not None:
        raise ValueError(
            f"{function} takes no ViT with attention windows, which the other library's classes "
            f"lack; got window={model_or_state.window}"
        )
    return model_or_state.state_dict()
