"""`checked` compares the arguments of a call with the annotations, and changes nothing else."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import nn

from mimkit import losses, masking, targets, viz
from mimkit import nn as mim
from mimkit._arguments import Count, checked
from mimkit.masking import Mask, stats
from mimkit.nn import PatchTokenizer
from mimkit.patches import gather_visible


@checked
def joined(first: Count, *rest: int, last: Count = 0, **others: int) -> tuple[object, ...]:
    return first, rest, last, others


def test_further_positional_arguments_are_not_taken_for_named_ones():
    assert joined(1, -2, -3, last=4, other=-5) == (1, (-2, -3), 4, {"other": -5})
    with pytest.raises(ValueError, match="last must be at least 0"):
        joined(1, 2, last=-1)
    uniform = stats.marginals(masking.uniform, (4, 4), 0.75, num_samples=8)
    assert uniform.sum().item() == pytest.approx(12)


class Failing(nn.Module):
    """Raises what it was given, from a weight of float32."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.error = error

    @checked
    def forward(self, x: torch.Tensor) -> None:
        raise self.error


MISMATCH = RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")


@pytest.mark.parametrize(
    "message",
    [
        str(MISMATCH),
        "expected scalar type Float but found Double",
        "Input type (double) and bias type (float) should be the same",
        "Expected all tensors to be on the same device, but found at least two devices",
    ],
)
def test_an_error_about_dtypes_names_the_argument(message):
    with pytest.raises(TypeError, match="^x is torch.float64 on cpu, but the weights"):
        Failing(RuntimeError(message))(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory: tensor of type Half"),
        torch.distributed.DistBackendError("NCCL error: tensor of type Half"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    ],
)
def test_an_error_about_something_else_stays_as_it_is(error):
    with pytest.raises(type(error), match=re.escape(str(error))):
        Failing(error)(torch.zeros(1, dtype=torch.float64))


def test_another_dtype_explains_nothing_under_autocast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="mat1"):
        Failing(MISMATCH)(torch.zeros(1, dtype=torch.bfloat16))


def test_a_drop_rate_of_one_is_refused_and_an_integer_layer_scale_works():
    small = {"image_size": 8, "patch_size": 4, "dim": 8, "heads": 2, "depth": 1}
    with pytest.raises(ValueError, match=r"drop_path must be a finite number in \[0, 1\); got 1"):
        mim.ViT(**small, drop_path=1.0)
    assert mim.ViT(**small, layer_scale=1).blocks[0].gamma_1.dtype == torch.float32


@pytest.mark.parametrize("seed", [-1, 1 << 30, (1 << 64) - 1])
def test_a_tokenizer_takes_any_seed_of_64_bits(seed):
    tokenizer = PatchTokenizer(patch_size=(4, 4), in_channels=3, vocabulary_size=2)
    tokenizer.fit(torch.rand(2, 3, 8, 8), iterations=1, seed=seed)
    with pytest.raises(ValueError, match="seed must be of at most 64 bits"):
        tokenizer.fit(torch.rand(2, 3, 8, 8), seed=1 << 64)


def test_means_and_deviations_may_be_tensors():
    images = torch.rand(2, 3, 8, 8)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    listed = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    tensors = {name: torch.tensor(values) for name, values in listed.items()}
    made = targets.Pixels(4, **listed)(images, mask)
    assert torch.equal(made, targets.Pixels(4, **tensors)(images, mask))
    assert torch.equal(
        losses.masked_pixel_loss(torch.zeros_like(made), images, mask, patch_size=4, **listed),
        losses.masked_pixel_loss(torch.zeros_like(made), images, mask, patch_size=4, **tensors),
    )


def test_a_patch_embedding_on_the_meta_device_names_a_wrong_dtype():
    embed = mim.PatchEmbed(patch_size=4, in_channels=3, dim=8).to("meta")
    with pytest.raises(TypeError, match="float64"):
        embed(torch.zeros(1, 3, 8, 8, dtype=torch.float64, device="meta"))


MASK = masking.uniform(masking.key([0, 1], seed=0), (2, 3), num_masked=2)


@pytest.mark.untyped
def test_an_axis_has_one_size_in_one_call():
    tokens = torch.zeros(2, 3, 8)
    with pytest.raises(
        ValueError, match=r"^positions must have queries = 3, as latent \(2, 3, 8\)"
    ):
        mim.CAEDecoder(dim=8, depth=1, heads=2)(tokens, tokens[:, :1])
    bias = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"^bias must have words = 7, as weight \(7, 8\); got \(5,"
    ):
        losses.linear_cross_entropy(tokens, torch.zeros(7, 8), bias, torch.zeros(2, 3).long())


@pytest.mark.untyped
def test_axes_named_as_those_of_a_mask_have_its_sizes():
    images, patches = torch.zeros(2, 1, 4, 6), torch.zeros(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"^patches must have masked = 2, as mask; got \(2, 3, 4\)"
    ):
        viz.fill_masked(images, MASK, patches, 2)


def test_values_may_not_be_missing_but_tokens_and_samples_may():
    with pytest.raises(ValueError, match=r"^images must be .* at least one value per spatial"):
        mim.PatchEmbed(patch_size=2, in_channels=1, dim=4)(torch.zeros(2, 1, 4, 0))
    nothing = masking.uniform(masking.key([0, 1], seed=0), (2, 3), num_masked=6)
    assert gather_visible(torch.zeros(2, 6, 8), nothing).shape == (2, 0, 8)
    assert gather_visible(torch.zeros(0, 6, 8), MASK[:0]).shape == (0, 4, 8)


def test_tensors_in_a_list_are_on_one_device():
    with pytest.raises(ValueError, match=r"^masks must be on one device; got \['cpu', 'meta'\]"):
        Mask.cat([MASK, MASK.to("meta")])
    with pytest.raises(ValueError, match=r"^targets is on meta, but context is on cpu"):
        masking.MultiBlock(MASK, [MASK.to("meta")])


def test_an_error_about_dtypes_names_the_argument_of_the_outer_module():
    decoder = mim.CAEDecoder(dim=8, depth=1, heads=2)
    tokens = torch.zeros(2, 3, 8)
    with pytest.raises(
        TypeError, match=r"^latent is torch.float64 .* this CAEDecoder are"
    ) as caught:
        decoder(tokens.double(), tokens)
    assert str(caught.value).count("weights of this") == 1


def test_a_ragged_mask_has_no_single_number_of_tokens():
    mask = masking.RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([True])])

    @checked
    def gather(masked: Float[torch.Tensor, "masked dim"], mask: masking.RaggedMask) -> None: ...

    gather(torch.zeros(2, 3), mask)


LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x[:, 0].to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "_mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore")  # some layouts are prototypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_is_not_dense_is_refused(layout):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    other = LAYOUTS[layout](torch.rand(2, 6, 4))
    shown = "nested" if layout == "jagged" else layout
    with pytest.raises(TypeError, match=rf"tokens must be a dense tensor; got .* layout {shown}"):
        gather_visible(other, mask)
    with pytest.raises(TypeError, match="prediction must be a dense tensor"):
        losses.masked_mse(other, torch.rand(2, 6, 4), mask)
    with pytest.raises((TypeError, ValueError), match="rows"):
        viz.panel([[other]], ["a"])


def test_floats_of_8_bits_and_quantized_tensors_are_refused_where_something_is_computed():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    tokens = torch.rand(2, 6, 4)
    small = tokens.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="prediction must be floats; got torch.float8_e4m3fn"):
        losses.masked_mse(small, tokens, mask)
    assert gather_visible(small, mask).dtype == torch.float8_e4m3fn  # moved, nothing is computed


@pytest.mark.parametrize("number", [Fraction(1, 2), Decimal("0.5"), 0.5 + 0j], ids=repr)
def test_numbers_that_pytorch_does_not_compute_with_are_refused(number):
    prediction = torch.rand(2, 6, 4)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    with pytest.raises((TypeError, ValueError), match="beta must be a finite number"):
        losses.masked_smooth_l1(prediction, prediction, mask, beta=number)
    losses.masked_smooth_l1(prediction, prediction, mask, beta=np.float32(0.5))


def test_codes_out_of_range_are_refused_where_they_are_turned_into_pixels():
    images = torch.rand(2, 3, 8, 8)
    tokenizer = PatchTokenizer(patch_size=(4, 4), in_channels=3, vocabulary_size=4).fit(images)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    bins = targets.ChannelBins(4, num_bins=8)
    for code in (-1, 8, 2**62):
        with pytest.raises(ValueError, match=r"ids must be in \[0, 4\)"):
            tokenizer.decode(torch.full((2, 2, 2), code), like=images)
        with pytest.raises(ValueError, match=r"values must be in \[0, 8\)"):
            bins.invert(torch.full_like(bins(images, mask), code), images, mask)
    logits, classes = torch.rand(2, 2, 9), torch.ones(2, 2, dtype=torch.uint16)
    with pytest.raises(TypeError, match=r"integers; got torch.uint16, in which PyTorch computes"):
        losses.masked_cross_entropy(logits, classes, mask)


@pytest.mark.parametrize("name", ["$\\frac{$", "\udcff", "\u65e5\x1b"], ids=ascii)
def test_curves_of_any_name_are_drawn_without_a_warning(name, recwarn):
    assert viz.curves([1.0, 2.0], {name: [1.0, 2.0]}, title=name).size == (700, 400)
    assert len(recwarn) == 0


def test_bytes_are_no_sequence_of_numbers():
    with pytest.raises((TypeError, ValueError), match="aspect must be"):
        masking.blockwise(masking.key([0], seed=0), (8, 8), 0.5, aspect=b"ab")


def test_an_mlp_of_a_ratio_beyond_memory_is_refused():
    with pytest.raises(ValueError, match="mlp_ratio must be .* above 0 and at most 1024"):
        mim.ViT(image_size=8, patch_size=4, dim=8, depth=1, heads=1, mlp_ratio=2.0**31)
