"""How names are translated: by rules, applied to any name -> tensor dictionary and any part of one.

In a pattern, `{i}` stands for a number and `{rest}` for the rest of a name; the first rule that
fits counts. Every rule keeps the values as they are.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor


class Converted(dict[str, Tensor]):
    """A name -> tensor dictionary that knows what was left out.

    Attributes:
        dropped: Names of the input that have no counterpart.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dropped: tuple[str, ...]) -> None:
        super().__init__(tensors)
        self.dropped = dropped


@dataclass(frozen=True)
class Rule:
    """One translation.

    Attributes:
        theirs: Pattern of the authors' names.
        ours: Pattern of mimkit's names; `None` leaves them out.
        is_pointwise: Whether the authors' tensor is the weight of a convolution of size 1, with two
            axes more than that of the linear layer which it is here.
    """

    theirs: str
    ours: str | None
    is_pointwise: bool = False


@dataclass(frozen=True)
class Translation:
    """The rules of one method.

    Attributes:
        rules: The rules, in the order in which they are tried.
        encoder_of: Takes the encoder out of a checkpoint of pre-training, and leaves another one as
            it is: from names of fine-tuning to the names that they have in it.
    """

    rules: tuple[Rule, ...]
    encoder_of: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {n: n for n in names}

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Converted:
        """Translate the authors' tensors."""
        converted, used = {}, set()
        for name, source in self.encoder_of(tensors).items():
            rule, new = translate(name, ((rule, rule.theirs, rule.ours) for rule in self.rules))
            if rule is not None and new is not None:
                tensor = tensors[source]
                converted[new] = tensor.flatten(1) if rule.is_pointwise else tensor
                used.add(source)
        return Converted(converted, tuple(name for name in tensors if name not in used))

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> Converted:
        """Undo `to_ours`."""
        swapped = [(rule, rule.ours, rule.theirs) for rule in self.rules if rule.ours is not None]
        swapped.sort(key=lambda entry: entry[1] == "{rest}")  # what fits any name comes last
        converted, dropped = {}, []
        for name, tensor in tensors.items():
            rule, new = translate(name, swapped)
            if rule is None or new is None:
                dropped.append(name)
            else:
                converted[new] = tensor[..., None, None] if rule.is_pointwise else tensor
        return Converted(converted, tuple(dropped))


def renames(*pairs: tuple[str, str | None]) -> tuple[Rule, ...]:
    """Make rules of (official, mimkit) patterns."""
    return tuple(Rule(theirs, ours) for theirs, ours in pairs)


def same(*patterns: str) -> tuple[Rule, ...]:
    """Make rules for names that are the same here and there."""
    return tuple(Rule(pattern, pattern) for pattern in patterns)


def within(rules: Iterable[Rule], *, theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Put prefixes in front of both patterns of rules."""
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
    """Find the first (rule, old pattern, new pattern) that fits; return its rule, the new name."""
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
