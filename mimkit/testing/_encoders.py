"""Property tests of masked encoders: no leak of hidden pixels, no effect across samples."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from mimkit._grids import Grid, divide
from mimkit.masking import Mask

Encoder = Callable[..., Tensor]
AnyMask = Mask | Bool[Tensor, "batch *grid"]

# Scales of the noise that replaces pixels: that of the images, and a much larger one.
_SCALES = (1.0, 1e3)
_ROUNDING = 1e-4  # relative to the largest value; another batch size may sum in another order


def assert_no_leak(
    encoder: Encoder, images: Float[Tensor, "batch channels *spatial"], mask: AnyMask
) -> None:
    """Check that no hidden pixel changes any output of `encoder(images, mask)`, bit for bit.

    Args:
        encoder: Any callable that returns one tensor. For tokens (visible or all, prefix tokens
            first) and feature maps [batch, channels, ...], the message says where the output
            changed. It is called at least twice, each time with the same random state.
        images: Images to test with.
        mask: A `Mask`, or booleans, one per patch, True = masked; passed to the encoder as it is.

    Raises:
        AssertionError: If a hidden pixel changes the output. The message names the masked patch,
            what it changes, and at which distance.

    Source:
        mimkit's own.

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
        AssertionError: If a sample changes the output of another one; the message names both.
        ValueError: If there are fewer than two images.

    Source:
        mimkit's own, after a fault of published encoders: `x[~mask].reshape(batch, ...)` puts
        tokens of one sample into another where their counts differ.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
        >>> mixing = lambda images, mask: images - images.mean(dim=0)
        >>> assert_samples_isolated(mixing, torch.rand(2, 3, 16, 16), mask)
        Traceback (most recent call last):
        AssertionError: sample 0 reaches sample 1: ...
    """
    if len(images) < 2:
        raise ValueError(f"at least two images are needed; got {len(images)}")
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
                f"sample {sample} reaches sample {other}: changing the pixels of sample {sample} "
                f"changes {_difference(output[other], expected[other])} in the output of sample "
                f"{other}; expected none to change"
            )


def assert_mask_equivariant(
    encoder: Encoder, images: Float[Tensor, "batch channels *spatial"], mask: Mask
) -> None:
    """Check that each output depends only on its own sample and mask, not on other calls or order.

    Outputs must be the same for a sample alone, for the batch, and for the batch in reverse order.
    Image gradients must be the same if the encoder is called with other masks before the backward
    pass. With activation checkpointing, a mask kept in a global variable fails this.

    Args:
        encoder: As in `assert_no_leak`, without dropout; its output has one row per sample.
        images: At least two images.
        mask: At least two different masks.

    Raises:
        AssertionError: At the first difference beyond rounding; the message names the sample.
        ValueError: If there are fewer than two images, or all masks are equal.

    Source:
        mimkit's own, after a fault of SparK, whose mask is a global variable: with activation
        checkpointing, gradients are those of another mask.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
        >>> first = lambda images, mask: images.flatten(2)[:, :, mask.visible_ids[0]]
        >>> assert_mask_equivariant(first, torch.rand(2, 3, 4, 4), mask)
        Traceback (most recent call last):
        AssertionError: the output of sample 1 alone differs from that in a batch of 2: ...
    """
    reverse = torch.arange(len(images) - 1, -1, -1, device=images.device)
    if len(images) < 2 or mask[reverse].equal(mask):
        raise ValueError(
            f"at least two images with different masks are needed; got {len(images)} images and "
            f"{mask}"
        )
    expected = _run(encoder, images, mask)
    for sample in range(len(images)):
        alone = _run(encoder, images[sample : sample + 1], mask[sample])
        where = f"from that in a batch of {len(images)}"
        _assert_close(f"the output of sample {sample} alone", where, alone[0], expected[sample])
    reordered = _run(encoder, images[reverse], mask[reverse])[reverse]
    for sample in range(len(images)):
        where = "with the samples in reverse order"
        _assert_close(f"the output of sample {sample}", where, reordered[sample], expected[sample])
    plain = _image_gradient(encoder, images, mask, between=None)
    mixed = _image_gradient(encoder, images, mask, between=mask[reverse])
    for sample in range(len(images)):
        where = "after a call with other masks before the backward pass"
        _assert_close(f"the gradient of sample {sample}", where, mixed[sample], plain[sample])


def _image_gradient(
    encoder: Encoder, images: Tensor, mask: Mask, *, between: Mask | None
) -> Tensor:
    """Image gradient of a fixed random projection; calls with `between` before the backward."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        output = encoder(leaf, mask)
        if between is not None:
            encoder(leaf.detach(), between)
        if not output.requires_grad:
            return torch.zeros_like(images)
        upstream = _noise_like(output.detach(), 1.0)
        try:
            (grad,) = torch.autograd.grad(output, leaf, upstream, allow_unused=True)
        except CheckpointError as error:
            raise AssertionError(
                f"recomputation in the backward pass gave another result: {error}"
            ) from error
    return torch.zeros_like(images) if grad is None else grad


def _assert_close(what: str, where: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{what} differs in shape {where}: expected {tuple(expected.shape)}; "
            f"got {tuple(actual.shape)}"
        )
    bound = _ROUNDING * float(expected.abs().max()) if expected.numel() else 0.0
    if not bool(((actual - expected).abs() <= bound).all()):  # also catches nan
        raise AssertionError(
            f"{what} differs {where}: {_difference(actual, expected)} differ; at most {bound:.2g} "
            "is rounding"
        )


def _run(encoder: Encoder, images: Tensor, mask: AnyMask) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # so that dropout is not reported as a leak
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
    """Describe a leak: the masked patch that leaks alone, or a minimal set that leaks together."""

    def run(patches: Sequence[Sequence[int]]) -> Tensor:
        only = torch.zeros_like(is_masked)
        only[tuple(torch.tensor(patches, device=only.device).T)] = True
        changed = torch.where(_on_pixels(only, images), _noise_like(images, scale), images)
        return _run(encoder, changed, mask)

    patches = _smallest_leak(
        is_masked.nonzero().tolist(), lambda some: not _bits_equal(run(some), expected)
    )
    output = run(patches)
    sample, *place = patches[0]
    if len(patches) > 1:
        named = ", ".join(f"{tuple(place)} of sample {sample}" for sample, *place in patches[:8])
        more = ", ..." if len(patches) > 8 else ""
        return (
            f"hidden pixels reach the output: {len(patches)} masked patches, but no fewer of them, "
            f"{named}{more}, change {_difference(output, expected)}; expected none to change"
        )
    where = ""
    if len(expected) == len(images):
        where = _farthest(encoder, output[sample], expected[sample], mask, sample, place)
    return (
        f"hidden pixels reach the output: the masked patch {tuple(place)} of sample {sample} "
        f"alone changes {_difference(output, expected)}{where}; expected none to change"
    )


def _smallest_leak(
    patches: list[list[int]], leaks: Callable[[list[list[int]]], bool]
) -> list[list[int]]:
    """Find the first patch that leaks alone, else a minimal set that leaks together."""
    for patch in patches:
        if leaks([patch]):
            return [patch]
    for patch in list(patches):
        fewer = [other for other in patches if other != patch]
        if leaks(fewer):
            patches = fewer
    return patches


def _farthest(
    encoder: Encoder,
    output: Tensor,
    expected: Tensor,
    mask: AnyMask,
    sample: int,
    place: Sequence[int],
) -> str:
    """Name the farthest patch whose output changed, if outputs can be assigned to patches."""
    is_masked = _booleans(mask)[sample]
    grid = tuple(is_masked.shape)
    differs = output != expected
    if output.ndim == 1 + len(grid) > 2 and all(
        size % patches == 0 for size, patches in zip(output.shape[1:], grid, strict=True)
    ):
        scale = [size // patches for size, patches in zip(output.shape[1:], grid, strict=True)]
        cells = differs.any(dim=0).nonzero().tolist()
        places = [tuple(c // s for c, s in zip(cell, scale, strict=True)) for cell in cells]
    elif output.ndim == 2:
        ids = (~is_masked).flatten().nonzero().squeeze(1)
        num_prefix = len(output) - len(ids)
        if num_prefix != getattr(encoder, "num_prefix_tokens", 0) and len(output) >= math.prod(
            grid
        ):
            ids, num_prefix = torch.arange(math.prod(grid)), len(output) - math.prod(grid)
        if num_prefix < 0:
            return ""
        tokens = ids[differs.any(dim=1)[num_prefix:].to(ids.device)].tolist()
        places = [_coordinates(token, grid) for token in tokens]
        if not places:
            return ", all in prefix tokens"
    else:
        return ""
    far = max(places, key=lambda other: math.dist(place, other))
    kind = "masked" if is_masked[far] else "visible"
    return f", as far as the {kind} patch {far}, {math.dist(place, far):.1f} patches away"


def _coordinates(token: int, grid: Grid) -> tuple[int, ...]:
    coordinates = []
    for size in reversed(grid):
        token, coordinate = divmod(token, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))


def _difference(output: Tensor, expected: Tensor) -> str:
    """Describe a difference: the number of values that differ, and the largest one."""
    differs = output != expected
    gap = (output - expected).abs().double()
    gap = gap.masked_fill(gap.isnan(), torch.inf)
    worst = _coordinates(int(gap.argmax()), tuple(gap.shape))
    return (
        f"{int(differs.sum())} of {differs.numel()} values (most at {list(worst)}: expected "
        f"{float(expected[worst]):.6g}, got {float(output[worst]):.6g})"
    )


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
    for values in (a, b):
        wrong = values.isnan()
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"expected a finite output; {int(wrong.sum())} of {wrong.numel()} values are not a "
                f"number, the first one at {first}"
            )
    return torch.equal(a, b)
