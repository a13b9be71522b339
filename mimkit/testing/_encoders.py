"""What every masked encoder must keep: hidden pixels stay hidden, samples stay apart."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mimkit._grids import Grid, divide
from mimkit.masking import Mask

Encoder = Callable[..., Tensor]
AnyMask = Mask | Bool[Tensor, "batch *grid"]

# What is written over pixels: noise of the images' own size, and much larger.
_SCALES = (1.0, 1e3)


def assert_no_leak(
    encoder: Encoder, images: Float[Tensor, "batch channels *spatial"], mask: AnyMask
) -> None:
    """Check that no hidden pixel changes any output of `encoder(images, mask)`, bit for bit.

    Args:
        encoder: Any callable that returns one tensor, [batch, tokens, dim] or [batch, ...]. It runs
            twice and more, each time from the same random state.
        images: Images on which to try.
        mask: A `Mask`; or booleans, one per patch, True = masked, given to the encoder as is.

    Raises:
        AssertionError: A leak, with the masked patch that leaks, what it changes and how far away.

    Example:
        >>> from mimkit import masking, nn
        >>> encoder = nn.ViT(image_size=16, patch_size=4, dim=16, depth=1, heads=2)
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
        >>> assert_no_leak(encoder, torch.rand(2, 3, 16, 16), mask)
        >>> assert_no_leak(lambda images, mask: images.flatten(2), torch.rand(2, 3, 16, 16), mask)
        Traceback (most recent call last):
        AssertionError: hidden pixels reach the output: ...
    """
    is_masked = _booleans(mask)
    hidden = _on_pixels(is_masked, images)
    expected = _run(encoder, images, mask)
    for scale in _SCALES:
        changed = torch.where(hidden, _noise_like(images, scale), images)
        if _bits_equal(_run(encoder, changed, mask), expected):
            continue
        raise AssertionError(_describe_leak(encoder, images, mask, is_masked, expected, scale))


def assert_samples_isolated(
    encoder: Encoder, images: Float[Tensor, "batch channels *spatial"], mask: AnyMask
) -> None:
    """Check that no sample of a batch changes the output of another one, bit for bit.

    Args:
        encoder: As in `assert_no_leak`; its output must have one row per sample.
        images: At least two images.
        mask: As in `assert_no_leak`; booleans may mask different numbers of tokens per sample.

    Raises:
        AssertionError: A sample that reaches another, naming both.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
        >>> mixing = lambda images, mask: images - images.mean(dim=0)
        >>> assert_samples_isolated(mixing, torch.rand(2, 3, 16, 16), mask)
        Traceback (most recent call last):
        AssertionError: sample 0 reaches sample 1: ...
    """
    if len(images) < 2:
        raise ValueError(f"two or more images are needed to tell samples apart; got {len(images)}")
    expected = _run(encoder, images, mask)
    if len(expected) != len(images):
        raise AssertionError(
            f"expected one output row for each of {len(images)} samples; "
            f"got shape {tuple(expected.shape)}"
        )
    for sample in range(len(images)):
        changed = images.clone()
        changed[sample] = _noise_like(images[sample], 10.0)
        output = _run(encoder, changed, mask)
        for other in range(len(images)):
            if other == sample or _bits_equal(output[other], expected[other]):
                continue
            raise AssertionError(
                f"sample {sample} reaches sample {other}: other pixels in the first change "
                f"{_how_much(output[other], expected[other])} of the second's output; "
                "expected none to change"
            )


def _run(encoder: Encoder, images: Tensor, mask: AnyMask) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # dropout and the like must not look like a leak
        output = encoder(images, mask)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the encoder must return a tensor; got {type(output).__name__}. "
            "Wrap it: lambda images, mask: model(images, mask).latent"
        )
    return output


def _describe_leak(
    encoder: Encoder,
    images: Tensor,
    mask: AnyMask,
    is_masked: Bool[Tensor, "batch *grid"],
    expected: Tensor,
    scale: float,
) -> str:
    """Find one masked patch that leaks by itself."""
    for sample, *place in is_masked.nonzero().tolist():
        only = torch.zeros_like(is_masked)
        only[(sample, *place)] = True
        changed = torch.where(_on_pixels(only, images), _noise_like(images, scale), images)
        output = _run(encoder, changed, mask)
        if _bits_equal(output, expected):
            continue
        where = _farthest(output[sample], expected[sample], mask, sample, place)
        return (
            f"hidden pixels reach the output: the masked patch {tuple(place)} of sample {sample} "
            f"alone changes {_how_much(output, expected)}{where}; expected none to change"
        )
    return "hidden pixels reach the output, though no masked patch does so alone"


def _farthest(
    output: Tensor, expected: Tensor, mask: AnyMask, sample: int, place: Sequence[int]
) -> str:
    """Say which visible patch is the farthest that changed, where outputs can be placed."""
    if not isinstance(mask, Mask) or output.ndim != 2 or len(output) < mask.num_visible:
        return ""
    num_prefix = len(output) - mask.num_visible
    differs = (output != expected).any(dim=1)[num_prefix:]
    ids = mask.visible_ids[sample][differs].tolist()
    if not ids:
        return ", all in prefix tokens"
    places = [_coordinates(token, mask.grid) for token in ids]
    distances = [math.dist(place, other) for other in places]
    far = max(range(len(ids)), key=distances.__getitem__)
    return f", as far as the visible patch {places[far]}, {distances[far]:.1f} patches away"


def _coordinates(token: int, grid: Grid) -> tuple[int, ...]:
    coordinates = []
    for size in reversed(grid):
        token, coordinate = divmod(token, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))


def _how_much(output: Tensor, expected: Tensor) -> str:
    differs = output != expected
    largest = (output - expected).abs().max().item()
    return f"{int(differs.sum())} of {differs.numel()} values, by up to {largest:.2g},"


def _booleans(mask: AnyMask) -> Bool[Tensor, "batch *grid"]:
    return mask.is_masked if isinstance(mask, Mask) else mask


def _on_pixels(
    is_masked: Bool[Tensor, "batch *grid"], images: Tensor
) -> Bool[Tensor, "batch 1 *spatial"]:
    grid = tuple(is_masked.shape[1:])
    for axis, pixels in enumerate(divide("image size", images.shape[2:], grid, "grid"), 1):
        is_masked = is_masked.repeat_interleave(pixels, dim=axis)
    return is_masked.unsqueeze(1)


def _noise_like(images: Tensor, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator).to(images) * scale
    return noise + images.mean()


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    if a.isnan().any() or b.isnan().any():
        raise AssertionError("the encoder returns values that are not a number")
    return torch.equal(a, b)
