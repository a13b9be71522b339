"""The fuzz of arguments: it finds planted faults, accepts a careful function, and tries our own."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from mimkit.testing import assert_rejects_wrong_inputs
from mimkit.testing._wrong_inputs import find_faults
from tests.public_calls import public_calls, public_names

pytestmark = pytest.mark.untyped  # types are wrong on purpose

X, Y = torch.rand(2, 5), torch.rand(2, 5)


def careful(x, factor=2.0):
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x must be a float32 tensor; got {x!r}")
    if x.is_meta:
        raise ValueError("x must hold values")
    if not isinstance(factor, int | float) or not abs(factor) < 1e30:
        raise ValueError(f"factor must be a finite number; got {factor!r}")
    return x * factor


def test_a_careful_function_passes():
    assert_rejects_wrong_inputs(careful, [X])


PLANTED = {
    "broadcasts a batch": (lambda x, y: x - y, [X, Y], "y: one sample", "silent"),
    "error from inside": (lambda x: torch.linalg.cholesky(x @ x.T), [X], "x: a text", "inside"),
    "takes nan": (lambda factor: min(1.0, factor), [0.5], "factor: nan", "silent"),
    "depends on the layout": (lambda x: x.view(-1), [X], "x: strides in another order", "inside"),
    "reads memory in order": (
        lambda x: torch.as_strided(x, x.shape, (x.shape[1], 1)),
        [X],
        "x: strides in another order",
        "silent",
    ),
    "integers from NaN": (lambda x: (x > 0.5).long(), [X], "x: a NaN", "silent"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    function, arguments, where, kind = PLANTED[fault]
    faults = find_faults(function, arguments).faults
    found = {f"{fault.argument}: {fault.label}": fault.kind for fault in faults}
    assert found.get(where) == kind


def draw(title: str, captions: Sequence[str], kind: Literal["a", "b"] = "a") -> str:
    if not isinstance(title, str) or not all(isinstance(word, str) for word in captions):
        raise TypeError(f"title and captions must be texts; got {title!r} and {captions!r}")
    return f"{title} {captions} {kind}"


def test_any_text_fits_an_annotation_of_str_but_not_one_of_a_choice():
    faults = find_faults(draw, ["a", ["b"]]).faults
    texts = {fault.argument for fault in faults if fault.label.endswith("another text")}
    assert texts == {"kind"}


class Shift(torch.nn.Module):
    def __init__(self, reads: bool):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(5))
        self.reads = reads

    def forward(self, x):
        return torch.zeros(len(x), 5) + self.bias if self.reads else x


@pytest.mark.parametrize("reads", [True, False])
def test_a_module_may_pass_on_an_input_without_values_but_not_make_values_of_it(reads):
    faults = find_faults(Shift(reads), [X]).faults
    assert any(fault.label == "meta" for fault in faults) == reads


def test_an_error_must_name_the_argument():
    def vague(x):
        if not isinstance(x, torch.Tensor):
            raise ValueError("no")

    assert any(fault.kind == "unnamed" for fault in find_faults(vague, [X]).faults)


def test_a_failing_valid_call_and_a_skip_without_a_reason_are_errors():
    with pytest.raises(AssertionError, match="the valid call of careful fails"):
        assert_rejects_wrong_inputs(careful, [None])
    with pytest.raises(ValueError, match="needs a reason"):
        assert_rejects_wrong_inputs(careful, [X], skip={"x": ""})
    with pytest.raises(ValueError, match="fits no call"):
        assert_rejects_wrong_inputs(careful, [X], skip={"z": "no such argument"})


UNCALLED = {
    "masking.Mask.pin_memory": "needs a GPU",
    "masking.RaggedMask.pin_memory": "needs a GPU",
    "targets.HOG.invert": "always raises NotImplementedError",
    "targets.FeatureTarget.invert": "always raises NotImplementedError",
    "targets.ColorClusters.save": "takes a path, which it overwrites",
    "targets.ColorClusters.load": "takes a path",
    "nn.ViT.group_matcher": "timm's protocol, tested beside timm: takes one switch",
    "nn.SwinTransformer.group_matcher": "timm's protocol, tested beside timm: takes one switch",
    "mimkit.use": "changes the settings of the process",
}
OTHER_ROOMS = ("interop.", "testing.")  # have no calls yet


def test_every_public_name_has_a_valid_call_or_a_reason():
    calls = {name.split(":")[0] for name in public_calls()}
    missing = {n for n in public_names() if not n.startswith(OTHER_ROOMS)} - calls
    assert missing == set(UNCALLED)


# What the fuzz still finds: call -> how many faults of which kind. A mend must shorten this.
KNOWN: dict[str, dict[str, int]] = {}


@pytest.mark.full
def test_public_names_have_exactly_the_known_faults():
    found = {}
    for name, (function, arguments) in public_calls().items():
        faults = find_faults(function, arguments, packages=["mimkit_kernels"]).faults
        if faults:
            found[name] = dict(Counter(fault.kind for fault in faults))
    assert found == KNOWN


@pytest.mark.parametrize("name", ["masking.uniform", "losses.alignment_mse"])
def test_a_sample_of_our_functions_passes(name):
    function, arguments = public_calls()[name]
    assert_rejects_wrong_inputs(function, arguments, packages=["mimkit_kernels"])
