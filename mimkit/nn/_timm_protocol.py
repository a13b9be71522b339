"""timm's protocol of a model, which its optimizers, checkpointing and feature extraction use."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimkit._features import FeatureMaps
from mimkit._grids import Grid
from mimkit.masking import Mask, RaggedMask
from mimkit.nn._layers import xavier_linear

Matcher = dict[str, Any] | Callable[[str], tuple[float, ...]]


class TimmProtocol(FeatureMaps):
    """An encoder with the methods that timm's functions look for on a model.

    `timm.optim.create_optimizer_v2(encoder, layer_decay=0.75, weight_decay=0.05)` then scales rates
    and leaves parameters out of weight decay as for timm's own model of the same shape.

    Attributes:
        grad_checkpointing: Whether blocks are computed again in backward instead of kept.

    Source:
        timm 1.0 `VisionTransformer`, `SwinTransformer`, `Beit`.
    """

    grad_checkpointing = False
    _num_class_tokens = 0
    _undecayed: ClassVar[str]  # matches the names of parameters that have no weight decay
    _first_layer: ClassVar[str]  # matches the names of parameters before the blocks

    num_prefix_tokens: int
    head: nn.Module
    pool: Callable[..., Tensor]

    @property
    def num_features(self) -> int:
        """Width of an output token; timm's name for `dim`."""
        return self.dim

    @property
    def num_classes(self) -> int:
        """Number of outputs of the head; 0 for none."""
        return int(getattr(self.head, "out_features", 0))

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that have no weight decay.

        Returns:
            Names as in `named_parameters`: positions, tokens, bias tables.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> sorted(encoder.no_weight_decay())
            ['cls_token', 'pos_embed']
        """
        return {name for name, _ in self.named_parameters() if re.search(self._undecayed, name)}

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Return what assigns parameters to layers, from first to last, for layer decay.

        Args:
            coarse: Whether a stage of several blocks is one layer.

        Returns:
            Patterns of parameter names by group, as timm's `group_parameters` takes them.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> sorted(encoder.group_matcher())
            ['blocks', 'stem']
        """
        blocks = [(r"^blocks\.(\d+)", None), (r"^rel_pos_bias\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": self._first_layer, "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward, instead of keeping what they computed.

        Args:
            enable: Whether to; it saves memory and costs a second forward of each block.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> encoder.set_grad_checkpointing()
            >>> encoder.grad_checkpointing
            True
        """
        self.grad_checkpointing = enable

    def forward_features(
        self, images: Any, mask: Mask | RaggedMask | None = None
    ) -> Float[Tensor, "batch prefix_and_tokens dim"] | Float[Tensor, "rows dim"]:
        """Encode, as a call does.

        Args:
            images: Images, as `forward` takes them.
            mask: Which patches are visible.

        Returns:
            What `forward` returns.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> encoder.forward_features(torch.rand(2, 3, 16, 24)).shape
            torch.Size([2, 7, 32])
        """
        encoded: Tensor = self(images, mask)
        return encoded

    def forward_head(
        self,
        tokens: Float[Tensor, "batch prefix_and_tokens dim"] | Float[Tensor, "rows dim"],
        pre_logits: bool = False,
        *,
        mask: RaggedMask | None = None,
    ) -> Float[Tensor, "batch _"]:
        """Pool encoded tokens, and classify them unless `pre_logits`.

        Args:
            tokens: Encoded tokens.
            pre_logits: Whether to return the pooled tokens.
            mask: The mask, if it was a `RaggedMask`.

        Returns:
            Logits; pooled tokens if `pre_logits` or if there is no classifier.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> encoder.reset_classifier(10)
            >>> encoder.forward_head(encoder(torch.rand(2, 3, 16, 24))).shape
            torch.Size([2, 10])
        """
        pooled = self.pool(tokens) if mask is None else self.pool(tokens, mask)
        logits: Tensor = pooled if pre_logits else self.head(pooled)
        return logits

    def forward_intermediates(
        self,
        images: Float[Tensor, "batch channels *spatial"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        *,
        mask: Mask | None = None,
    ) -> Any:
        """Encode, and return the outputs of some blocks (Swin: stages) too.

        Args:
            images: Images.
            indices: The last n blocks, or these; all if `None`.
            return_prefix_tokens: Whether to return pairs of patch tokens and prefix tokens.
            norm: Whether to apply the last norm to the outputs of blocks.
            stop_early: Accepted as timm's name; all blocks are computed.
            output_fmt: "NCHW" for feature maps, "NLC" for tokens, the only form with a mask.
            intermediates_only: Whether to return the outputs of blocks only.
            mask: Which patches are visible.

        Returns:
            The encoded tokens and a list of the outputs; with `intermediates_only` the list.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If `output_fmt` is unknown, or "NCHW" with a mask, or an index is out of
                range.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> tokens, maps = encoder.forward_intermediates(torch.rand(2, 3, 16, 24), indices=1)
            >>> tokens.shape, [tuple(map.shape) for map in maps]
            (torch.Size([2, 7, 32]), [(2, 32, 2, 3)])
        """
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"forward_intermediates needs a Mask; got a {type(mask).__name__}")
        if output_fmt not in ("NCHW", "NLC") or (mask is not None and output_fmt == "NCHW"):
            raise ValueError(
                f'output_fmt must be "NCHW" or "NLC", with a mask "NLC"; got {output_fmt!r}'
            )
        stages = self._stages()
        count = len(stages)
        chosen = range(count) if indices is None else indices
        chosen = range(count - chosen, count) if isinstance(chosen, int) else chosen
        if any(not -count <= index < count for index in chosen):
            raise ValueError(f"indices must be within the {count} blocks; got {indices}")
        wanted = {index % count for index in chosen}
        with _outputs_of([stages[index] for index in sorted(wanted)]) as outputs:
            encoded = self(images, mask)
        split = []
        for index, tokens in zip(sorted(wanted), outputs, strict=True):
            normed = self.get_submodule("norm")(tokens) if norm and self._fits(index) else tokens
            prefix, patches = normed.tensor_split([self.num_prefix_tokens], dim=1)
            if output_fmt == "NCHW":
                patches = patches.mT.unflatten(2, self._grid_of(index)).contiguous()
            with_prefix = return_prefix_tokens and self.num_prefix_tokens
            split.append((patches, prefix) if with_prefix else patches)
        return split if intermediates_only else (encoded, split)

    def get_classifier(self) -> nn.Module:
        """Return the classifier.

        Returns:
            The head: a linear layer, or the identity if there is none.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> encoder.get_classifier()
            Identity()
        """
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place of the head; 0 classes for none.

        Args:
            num_classes: Number of classes.
            global_pool: What `pool` returns from now on: "avg" or "token"; unchanged if `None`.

        Raises:
            ValueError: If the encoder cannot pool so.

        Example:
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> encoder.reset_classifier(10, global_pool="avg")
            >>> encoder.get_classifier()
            Linear(in_features=32, out_features=10, bias=True)
        """
        if global_pool is not None:
            self._set_pool(global_pool)
        like = next(self.parameters())
        self.head = xavier_linear(self.dim, num_classes).to(like) if num_classes else nn.Identity()

    def _run(self, block: nn.Module, *args: Any, **options: Any) -> Any:
        """Call a block, checkpointed if that is switched on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, **options)
        return block(*args, **options)

    def _stages(self) -> Sequence[nn.Module]:
        blocks: Any = self.blocks
        return list(blocks)

    def _fits(self, stage: int) -> bool:
        """Whether the last norm fits the output of a stage."""
        return True

    def _grid_of(self, stage: int) -> Grid:
        grid: Any = self.grid
        return tuple(grid)

    def _set_pool(self, name: str) -> None:
        known = {"avg": "mean", "token": "token"}
        if name not in known or (name == "token" and not self._num_class_tokens):
            raise ValueError(
                f'global_pool must be "avg", or with a class token "token"; got {name!r}'
            )
        self._pool = known[name]


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what modules return while the context is open; of several results, the first."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
