"""DALL-E's discrete VAE. BEiT and CAE predict its codes.

Axes: batch; channels; height, width (pixels); rows, columns (of codes); vocabulary.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import NotNegative, Positive, Size, checked
from mimkit._checks import as_floats, check_classes, check_no_nan
from mimkit._containers import container
from mimkit._grids import divide

_EPS = 0.1  # distance of mapped pixels from 0 and 1, where the logit is infinite


def map_pixels(images: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Map pixels from [0, 1] to [0.1, 0.9], the range of the networks.

    Source:
        DALL-E, arXiv:2102.12092, appendix A.3; openai/DALL-E `map_pixels`.

    Example:
        >>> map_pixels(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.1000, 0.5000, 0.9000])
    """
    return (1 - 2 * _EPS) * images + _EPS


def unmap_pixels(pixels: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Undo `map_pixels`, and clip to [0, 1].

    Example:
        >>> unmap_pixels(torch.tensor([0.1, 0.5, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return ((pixels - _EPS) / (1 - 2 * _EPS)).clamp(0, 1)


class _Block(nn.Module):
    """Residual block of four convolutions, with a constant gain on the residual branch."""

    def __init__(
        self, in_dim: int, out_dim: int, kernels: tuple[int, int, int, int], gain: float
    ) -> None:
        super().__init__()
        hidden = out_dim // 4
        widths = [in_dim, hidden, hidden, hidden, out_dim]
        layers: list[tuple[str, nn.Module]] = []
        for i, kernel in enumerate(kernels):
            layers.append((f"relu_{i + 1}", nn.ReLU()))
            layers.append((f"conv_{i + 1}", _conv(widths[i], widths[i + 1], kernel)))
        self.id_path = nn.Identity() if in_dim == out_dim else _conv(in_dim, out_dim, 1)
        self.res_path = nn.Sequential(OrderedDict(layers))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


def _conv(in_dim: int, out_dim: int, kernel: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2)
    assert layer.bias is not None
    # As in the released code: normal with standard deviation fan_in ** -0.5.
    nn.init.normal_(layer.weight, std=(in_dim * kernel**2) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


def _trunk(
    stem: nn.Module,
    widths: list[int],
    depth: int,
    kernels: tuple[int, int, int, int],
    resize: tuple[str, Callable[[], nn.Module]],
    out_dim: int,
) -> nn.Sequential:
    """Build a stem, groups of blocks with a change of resolution between them, and an output layer.

    Args:
        stem: The first layer.
        widths: Output width of the stem, then of each group.
        depth: Blocks per group.
        kernels: Kernel sizes of a block's four convolutions.
        resize: Name and constructor of the layer between groups.
        out_dim: Output width of the last layer.
    """
    gain = float((len(widths) - 1) * depth) ** -2
    layers: list[tuple[str, nn.Module]] = [("input", stem)]
    for number, (before, width) in enumerate(zip(widths[:-1], widths[1:], strict=True), 1):
        group: list[tuple[str, nn.Module]] = [
            (f"block_{i + 1}", _Block(width if i else before, width, kernels, gain))
            for i in range(depth)
        ]
        if number < len(widths) - 1:
            group.append((resize[0], resize[1]()))
        layers.append((f"group_{number}", nn.Sequential(OrderedDict(group))))
    last = OrderedDict(relu=nn.ReLU(), conv=_conv(widths[-1], out_dim, 1))
    return nn.Sequential(OrderedDict([*layers, ("output", nn.Sequential(last))]))


class DiscreteEncoder(nn.Module):
    """Convolutional encoder from pixels, mapped by `map_pixels`, to logits over codes."""

    def __init__(
        self, *, in_channels: int, dim: int, groups: int, depth: int, vocabulary_size: int
    ) -> None:
        super().__init__()
        self.blocks = _trunk(
            _conv(in_channels, dim, 7),
            [dim, *(dim << group for group in range(groups))],
            depth,
            (3, 3, 3, 1),
            ("pool", lambda: nn.MaxPool2d(2)),
            vocabulary_size,
        )

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch vocabulary rows columns"]:
        """Return logits over codes at each position."""
        logits: Tensor = self.blocks(pixels)
        return logits


class DiscreteDecoder(nn.Module):
    """Convolutional decoder from one-hot (or soft) codes to mean and log scale of each pixel."""

    def __init__(
        self,
        *,
        in_channels: int,
        dim: int,
        stem_dim: int,
        groups: int,
        depth: int,
        vocabulary_size: int,
    ) -> None:
        super().__init__()
        self.blocks = _trunk(
            _conv(vocabulary_size, stem_dim, 1),
            [stem_dim, *(dim << group for group in reversed(range(groups)))],
            depth,
            (1, 3, 3, 3),
            ("upsample", lambda: nn.Upsample(scale_factor=2, mode="nearest")),
            2 * in_channels,
        )

    def forward(
        self, codes: Float[Tensor, "batch vocabulary rows columns"]
    ) -> Float[Tensor, "batch two_channels height width"]:
        """Return the parameters of the logit-Laplace distribution: means, then log scales."""
        statistics: Tensor = self.blocks(codes)
        return statistics


@container
class DiscreteVAEOutput:
    """Output of a training step.

    Attributes:
        loss: Reconstruction loss plus weighted divergence.
        reconstruction_loss: Mean negative log-likelihood per pixel value, in nats.
        divergence: KL divergence of the code distributions from uniform, in nats per position.
        images: The reconstruction, in [0, 1].
        ids: The most likely code of each position.
    """

    loss: Float32[Tensor, ""]
    reconstruction_loss: Float32[Tensor, ""]
    divergence: Float32[Tensor, ""]
    images: Shaped[Tensor, "batch channels height width"]
    ids: Int64[Tensor, "batch rows columns"]


class DiscreteVAE(nn.Module):
    """Discrete variational autoencoder: images in [0, 1] to code ids, and back.

    Args:
        in_channels: Channels of the images.
        dim: Width at full resolution; every further group of the encoder doubles it.
        groups: Groups of blocks. Resolution is halved between groups, so a code covers
            `2 ** (groups - 1)` pixels per axis.
        depth: Blocks per group.
        vocabulary_size: Number of codes.
        stem_dim: Width of a code's embedding in the decoder.
        has_decoder: Whether to build the decoder; `encode` does not need it.

    Attributes:
        stride: Pixels per code, per axis.

    Raises:
        ValueError: If `dim` is not divisible by 4.

    Source:
        DALL-E, arXiv:2102.12092, appendix A; openai/DALL-E `Encoder`, `Decoder`, whose sizes are
        the defaults. OpenAI did not release its training code; see `forward`.

    Example:
        >>> vae = DiscreteVAE(dim=8, groups=3, depth=1, vocabulary_size=16, stem_dim=8)
        >>> ids = vae.encode(torch.rand(2, 3, 16, 24))
        >>> ids.shape, vae.decode(ids).shape
        (torch.Size([2, 4, 6]), torch.Size([2, 3, 16, 24]))
    """

    @checked
    def __init__(
        self,
        *,
        in_channels: Size = 3,
        dim: Size = 256,
        groups: Size = 4,
        depth: Size = 2,
        vocabulary_size: Size = 8192,
        stem_dim: Size = 128,
        has_decoder: bool = True,
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be divisible by 4; got {dim}")
        self.in_channels = in_channels
        self.vocabulary_size = vocabulary_size
        self.stride = 1 << (groups - 1)
        self.encoder = DiscreteEncoder(
            in_channels=in_channels,
            dim=dim,
            groups=groups,
            depth=depth,
            vocabulary_size=vocabulary_size,
        )
        self.decoder = (
            DiscreteDecoder(
                in_channels=in_channels,
                dim=dim,
                stem_dim=stem_dim,
                groups=groups,
                depth=depth,
                vocabulary_size=vocabulary_size,
            )
            if has_decoder
            else None
        )

    @torch.no_grad()
    @checked
    def encode(
        self, images: Shaped[Tensor, "batch channels height width"]
    ) -> Int64[Tensor, "batch rows columns"]:
        """Return the most likely code of each position.

        Args:
            images: Pixels in [0, 1], or uint8.

        Returns:
            Codes in [0, vocabulary_size), one per square of `stride` pixels.

        Raises:
            ValueError: If the images have another number of channels, or a size that is not
                divisible by the stride, or (on a CPU) contain NaN.
        """
        check_no_nan("images", images)
        return self._logits(images).argmax(dim=1)

    @torch.no_grad()
    @checked
    def decode(
        self, ids: Int64[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Decode codes to images in [0, 1].

        Args:
            ids: Codes in [0, vocabulary_size).

        Returns:
            Images, `stride` pixels per code and axis.

        Raises:
            ValueError: If there is no decoder, or a code is out of range.
        """
        check_classes("ids", ids, self.vocabulary_size)
        codes = F.one_hot(ids, self.vocabulary_size).movedim(-1, 1).float()
        mean, _ = self._statistics(codes)
        return unmap_pixels(mean.sigmoid())

    @checked
    def forward(
        self,
        images: Shaped[Tensor, "batch channels height width"],
        *,
        temperature: Positive = 1.0,
        divergence_weight: NotNegative = 0.0,
        hard: bool = True,
    ) -> DiscreteVAEOutput:
        """Encode and decode images, and compute the training loss.

        Args:
            images: Pixels in [0, 1].
            temperature: Temperature of the Gumbel softmax; a low one gives nearly one-hot codes.
            divergence_weight: Weight of the KL divergence from uniform in the loss.
            hard: Whether the decoder reads one-hot codes with a straight-through gradient, or the
                soft ones.

        Returns:
            The loss, and what it is made of.

        Raises:
            ValueError: If the images do not fit (see `encode`), or there is no decoder.

        Source:
            DALL-E, arXiv:2102.12092, section 2.1 and appendix A.3: Gumbel-softmax relaxation, and
            the logit-Laplace distribution of pixels.

        Example:
            >>> vae = DiscreteVAE(dim=8, groups=3, depth=1, vocabulary_size=16, stem_dim=8)
            >>> vae(torch.rand(2, 3, 16, 24), temperature=0.5).loss.shape
            torch.Size([])
        """
        if not len(images):
            raise ValueError("images must have at least one sample, for a mean loss; got none")
        logits = self._logits(images)
        codes = F.gumbel_softmax(logits, tau=temperature, hard=hard, dim=1)
        mean, log_scale = self._statistics(codes)
        target = map_pixels(images)
        # Negative log-density of the logit-Laplace distribution, with its constant terms.
        error = (target.logit() - mean).abs() * torch.exp(-log_scale)
        nll = log_scale + error + torch.log(2 * target * (1 - target))
        log_probs = logits.log_softmax(dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
        divergence = torch.log(entropy.new_tensor(self.vocabulary_size)) - entropy
        reconstruction_loss = nll.float().mean()
        loss = reconstruction_loss + divergence_weight * divergence.float()
        return DiscreteVAEOutput(
            loss,
            reconstruction_loss,
            divergence.float(),
            unmap_pixels(mean.sigmoid()),
            logits.argmax(dim=1),
        )

    def _statistics(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        if self.decoder is None:
            raise ValueError("this DiscreteVAE has no decoder: build it with has_decoder=True")
        mean, log_scale = self.decoder(codes).chunk(2, dim=1)
        return mean, log_scale

    def _logits(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images must be [batch, {self.in_channels}, height, width]; "
                f"got {tuple(images.shape)}"
            )
        divide("image size", images.shape[2:], self.stride, "the tokenizer's stride")
        logits: Tensor = self.encoder(map_pixels(as_floats(images)))
        return logits
