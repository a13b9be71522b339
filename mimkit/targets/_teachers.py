"""Targets computed by another, frozen model.

Axes: batch; channels; *spatial; masked (tokens); dim; patch (the values of one patch).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import Count, checked
from mimkit._checks import check_even, check_no_nan
from mimkit.masking import Mask
from mimkit.patches import gather_masked, patchify


@checked
@dataclass(frozen=True, eq=False)
class TokenTarget:
    """The codes of a tokenizer at the masked positions.

    Attributes:
        encode: Function from images to one code per token: [batch, tokens] or [batch, *grid].
        decode: Function from codes [batch, *grid] to images; only needed by `invert`.
        patch_size: Pixels per patch of the decoded images; only needed by `invert`.
        uses_ground_truth: Whether `invert` reads masked pixels: True. It also decodes the codes of
            visible positions, and these depend on pixels around them.

    Source:
        BEiT, arXiv:2106.08254, section 2.2; CAE, arXiv:2202.03026, section 3.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> target = TokenTarget(lambda images: (images[:, 0] > 0).long())
        >>> target(torch.ones(1, 1, 1, 2), mask)
        tensor([[1]])
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor] | None = None
    patch_size: int | Sequence[int] | None = None
    uses_ground_truth: ClassVar[bool] = True

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Int64[Tensor, "batch masked"]:
        """Return the codes of the masked tokens.

        Args:
            images: Images, as the tokenizer takes them.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One code per masked token, in ascending order of position.

        Raises:
            ValueError: If the grid of the codes is not that of the mask.
        """
        return gather_masked(self._codes(images, mask).unsqueeze(2), mask).squeeze(2)

    @checked
    def invert(
        self,
        values: Int64[Tensor, "batch masked"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Decode the codes, and return the masked patches of the decoded images.

        Args:
            values: Codes of the masked tokens.
            images: Images, which give the codes of the visible tokens.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            NotImplementedError: If `decode` or `patch_size` is `None`.
            ValueError: If the grid of the codes is not that of the mask.

        Example:
            >>> images = torch.ones(1, 1, 1, 2)
            >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
            >>> encode, decode = (lambda x: x[:, 0].long()), (lambda ids: ids.unsqueeze(1).float())
            >>> target = TokenTarget(encode, decode=decode, patch_size=1)
            >>> target.invert(torch.tensor([[7]]), images, mask)
            tensor([[[7.]]])
        """
        if self.decode is None or self.patch_size is None:
            raise NotImplementedError("invert needs a TokenTarget with decode and patch_size")
        codes = self._codes(images, mask).scatter(1, mask.masked_ids, values)
        with torch.no_grad():
            decoded = self.decode(codes.view(-1, *mask.grid))
        return gather_masked(patchify(decoded, self.patch_size), mask)

    def _codes(self, images: Tensor, mask: Mask) -> Tensor:
        check_even(mask)
        check_no_nan("images", images)
        with torch.no_grad():
            codes = self.encode(images)
        is_other_grid = codes.ndim > 2 and tuple(codes.shape[1:]) != mask.grid
        if is_other_grid or codes.flatten(1).shape != (mask.batch_size, mask.num_tokens):
            raise ValueError(
                f"encode must return one code per token for images {tuple(images.shape)} and a "
                f"mask of grid {mask.grid}; got {tuple(codes.shape)}"
            )
        return codes.flatten(1)


@checked
@dataclass(frozen=True, eq=False)
class FeatureTarget:
    """Features of a frozen teacher at the masked positions.

    Attributes:
        teacher: Function from images to tokens: [batch, prefix + tokens, dim].
        num_prefix: Prefix tokens in front of the grid's tokens, which are dropped.
        normalize: Whether to normalise each feature vector to zero mean and unit variance.
        uses_ground_truth: False: `invert` is not possible.

    Source:
        MaskFeat, arXiv:2112.09133, section 3.2 "deep features"; normalised as in data2vec,
        arXiv:2202.03555, section 3.3.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> target = FeatureTarget(lambda images: images.flatten(2).transpose(1, 2))
        >>> target(torch.rand(1, 8, 1, 2), mask).shape
        torch.Size([1, 1, 8])
    """

    teacher: Callable[[Tensor], Tensor]
    num_prefix: Count = 0
    normalize: bool = True
    uses_ground_truth: ClassVar[bool] = False

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Float[Tensor, "batch masked dim"]:
        """Return the features of the masked tokens.

        Args:
            images: Images, as the teacher takes them.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Features, float32, without a gradient.

        Raises:
            ValueError: If the number of tokens does not fit the mask.
        """
        with torch.no_grad():
            tokens = self.teacher(images)[:, self.num_prefix :]
        features = gather_masked(tokens, mask).float()
        return F.layer_norm(features, features.shape[2:]) if self.normalize else features

    @checked
    def invert(
        self, values: Tensor, images: Tensor, mask: Mask
    ) -> Float[Tensor, "batch masked patch"]:
        """Not possible: pixels cannot be computed from features.

        Args:
            values: Any.
            images: Any.
            mask: Any.

        Returns:
            Nothing: it always raises.

        Raises:
            NotImplementedError: Always.

        Example:
            >>> mask = Mask.from_bool(torch.tensor([[[True]]]))
            >>> target = FeatureTarget(torch.nn.Identity())
            >>> target.invert(torch.rand(1, 1, 8), torch.rand(1, 3, 4, 4), mask)
            Traceback (most recent call last):
            NotImplementedError: a teacher's features cannot be turned back into pixels
        """
        raise NotImplementedError("a teacher's features cannot be turned back into pixels")
