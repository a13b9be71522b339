"""Rules that translate parameter names; they apply to any subset of a state dict.

In a pattern, `{i}` matches a number and `{rest}` the rest of a name. The first rule that matches is
used. No rule changes a value.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor


class Converted(dict[str, Tensor]):
    """A converted state dict that also lists what was dropped.

    Attributes:
        dropped: Names of the input that have no counterpart.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dropped: tuple[str, ...]) -> None:
        super().__init__(tensors)
        self.dropped = dropped


@dataclass(frozen=True)
class Rule:
    """Translation of one pattern of names.

    Attributes:
        theirs: Pattern of the authors' names.
        ours: Pattern of mimkit's names; `None` drops them.
        is_pointwise: Whether the authors' tensor is the weight of a 1x1 convolution and ours that
            of a linear layer, which has two axes less.
    """

    theirs: str
    ours: str | None
    is_pointwise: bool = False


@dataclass(frozen=True)
class Translation:
    """The rules of one method.

    Attributes:
        rules: The rules, in the order in which they are tried.
        encoder_of: Selects the encoder of a pre-training checkpoint: takes the checkpoint's names,
            returns fine-tuning name -> name in the checkpoint. The identity for other checkpoints.
    """

    rules: tuple[Rule, ...]
    encoder_of: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {n: n for n in names}

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Converted:
        """Convert the authors' tensors to mimkit's."""
        converted, used = {}, set()
        for name, source in self.encoder_of(tensors).items():
            rule, new = translate(name, ((rule, rule.theirs, rule.ours) for rule in self.rules))
            if rule is not None and new is not None:
                tensor = tensors[source]
                converted[new] = tensor.flatten(1) if rule.is_pointwise else tensor
                used.add(source)
        return Converted(converted, tuple(name for name in tensors if name not in used))

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> Converted:
        """Convert mimkit's tensors to the authors': the inverse of `to_ours`."""
        swapped = [(rule, rule.ours, rule.theirs) for rule in self.rules if rule.ours is not None]
        swapped.sort(key=lambda entry: entry[1] == "{rest}")  # the catch-all pattern comes last
        converted, dropped = {}, []
        for name, tensor in tensors.items():
            rule, new = translate(name, swapped)
            if rule is None or new is None:
                dropped.append(name)
            else:
                converted[new] = tensor[..., None, None] if rule.is_pointwise else tensor
        return Converted(converted, tuple(dropped))


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


def translate(
    name: str, entries: Iterable[tuple[Rule, str, str | None]]
) -> tuple[Rule | None, str | None]:
    """Apply the first (rule, old pattern, new pattern) that matches; return rule and new name."""
    for rule, old, new in entries:
        match = _expression(old).fullmatch(name)
        if match:
            return rule, None if new is None else new.format(**match.groupdict())
    return None, None


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    expression = expression.replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(expression.replace(r"\{rest\}", r"(?P<rest>.+)"))
