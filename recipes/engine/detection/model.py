"""Mask R-CNN with the heads of ViTDet on a mimkit encoder, from torchvision's parts.

This module imports torchvision; `recipes/detect.py` says in one line if that cannot be done.

Axes: batch; channels; height, width in pixels; objects. Class 0 is the background.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mimkit.nn import ConvViTDetector, FeaturePyramid, ViT
from recipes.engine.detection.shape import DetectorShape

# LayerNorm over the channels of a map, as in ViTDet.
NORM = partial(LayerNorm2d, eps=1e-6)
_RATIOS = (0.5, 1.0, 2.0)
_BOX, _MASK = 7, 14  # sides of what is pooled from a box
# Of a cascade: the overlap from which a box counts as an object, and the scales of its corrections.
_OVERLAPS = (0.5, 0.6, 0.7)
_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))

Maps = dict[str, Tensor]
Targets = list[dict[str, Tensor]]


class Backbone(nn.Module):
    """An encoder and a feature pyramid.

    An encoder with maps of several strides has torchvision's feature pyramid network, one with maps
    of a single stride has ViTDet's simple pyramid. A max-pooled level is added to both.

    Args:
        encoder: A ViT, SwinTransformer or ConvViTDetector.
        dim: Channels of every level.
    """

    def __init__(self, encoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = map_channels(encoder)
        self.is_plain = len(widths) == 1
        self.pyramid: nn.Module = (
            FeaturePyramid(dim=widths[0], out_dim=dim)
            if self.is_plain
            else FeaturePyramidNetwork(
                [*widths], dim, extra_blocks=LastLevelMaxPool(), norm_layer=NORM
            )
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Maps:
        """Return the levels by name, from fine to coarse."""
        maps = feature_maps(self.encoder, images)
        if not self.is_plain:
            levels: Maps = self.pyramid({str(level): one for level, one in enumerate(maps)})
            return levels
        finer = self.pyramid(maps[0])
        coarsest = F.max_pool2d(finer[-1], kernel_size=1, stride=2)
        return {str(level): one for level, one in enumerate([*finer, coarsest])}


def feature_maps(encoder: Any, images: Tensor) -> list[Tensor]:
    """Return an encoder's maps for detection, from fine to coarse."""
    is_detector = isinstance(encoder, ConvViTDetector)  # called, it adds a max-pooled fourth map
    return list(encoder(images) if is_detector else encoder.features(images))


def map_channels(encoder: Any) -> list[int]:
    """Return the channels of the maps that `feature_maps` returns."""
    widths: tuple[int, ...] = encoder.feature_channels
    if isinstance(encoder, ConvViTDetector):
        return [*widths[:2], widths[-1], widths[-1]]
    return [widths[-1]] if isinstance(encoder, ViT) else [*widths]


class Detector(nn.Module):
    """Mask R-CNN, or Cascade Mask R-CNN.

    Args:
        encoder: The encoder, as `Backbone` takes it.
        shape: Sizes of the other parts.
        num_classes: Number of classes, without the background.

    Source:
        He et al., arXiv:1703.06870; the heads of ViTDet, arXiv:2203.16527, appendix A.2: two
        convolutions in the proposal network, four and a linear layer in the box head, LayerNorm.
        Box corrections of one box head are by class here, as in torchvision and in ViTDet.
    """

    def __init__(self, encoder: nn.Module, shape: DetectorShape, num_classes: int) -> None:
        super().__init__()
        self.backbone = Backbone(encoder, shape.dim)
        anchors = AnchorGenerator(
            tuple((side,) for side in shape.anchors), (_RATIOS,) * len(shape.anchors)
        )
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(shape.dim, len(_RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * shape.proposals, "testing": shape.proposals},
            post_nms_top_n={"training": shape.proposals, "testing": shape.proposals},
            nms_thresh=0.7,
        )
        self.roi_heads = (CascadeHeads if shape.cascade else RoIHeads)(**_heads(shape, num_classes))

    @property
    def encoder(self) -> nn.Module:
        """The encoder."""
        return self.backbone.encoder

    def forward(
        self, images: Float[Tensor, "batch channels height width"], targets: Targets | None = None
    ) -> Any:
        """Return the losses by name in training, otherwise the objects of each image.

        Args:
            images: Model inputs.
            targets: In training, `boxes`, `labels` (from 1) and `masks` of each image.

        Returns:
            Losses; or `boxes`, `labels`, `scores` and `masks` (28 x 28 pixels of each box, in
            [0, 1]) of each image. `paste` draws them.
        """
        maps = self.backbone(images)
        # Of the padded images: torchvision takes the strides of the levels from the first batch.
        sizes = [tuple(images.shape[2:])] * len(images)
        proposals, proposal_losses = self.rpn(ImageList(images, sizes), maps, targets)
        found, losses = self.roi_heads(maps, proposals, sizes, targets)
        return {**proposal_losses, **losses} if self.training else found


def _heads(shape: DetectorShape, num_classes: int) -> dict[str, Any]:
    """Return the arguments of `RoIHeads`."""
    pool = partial(
        MultiScaleRoIAlign,
        [str(level) for level in range(len(shape.anchors) - 1)],
        sampling_ratio=2,
        canonical_scale=7 * shape.anchors[0],  # 224 pixels for the usual anchors from 32
    )
    classes = num_classes + 1
    return {
        "box_roi_pool": pool(output_size=_BOX),
        "box_head": FastRCNNConvFCHead(
            (shape.dim, _BOX, _BOX), [shape.dim] * shape.convs, [shape.fc_dim], norm_layer=NORM
        ),
        "box_predictor": FastRCNNPredictor(shape.fc_dim, classes),
        "fg_iou_thresh": _OVERLAPS[0],
        "bg_iou_thresh": _OVERLAPS[0],
        "batch_size_per_image": shape.samples,
        "positive_fraction": 0.25,
        "bbox_reg_weights": _WEIGHTS[0],
        "score_thresh": shape.least_score,
        "nms_thresh": 0.5,
        "detections_per_img": shape.detections,
        "mask_roi_pool": pool(output_size=_MASK),
        "mask_head": MaskRCNNHeads(shape.dim, [shape.dim] * shape.convs, 1, norm_layer=NORM),
        "mask_predictor": MaskRCNNPredictor(shape.dim, shape.dim, classes),
    }


class CascadePredictor(nn.Module):
    """Class and correction of a box; the correction is the same for all classes."""

    def __init__(self, in_dim: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_dim, classes)
        self.bbox_pred = nn.Linear(in_dim, 4)

    def forward(self, x: Float[Tensor, "boxes dim"]) -> tuple[Tensor, Tensor]:
        """Return logits, and the correction once for each class."""
        logits: Tensor = self.cls_score(x)
        return logits, self.bbox_pred(x).repeat(1, logits.shape[1])


class CascadeHeads(RoIHeads):  # type: ignore[misc]
    """Box heads one after the other, each on the boxes that the one before has corrected.

    Args:
        arguments: As of `RoIHeads`; the first box head is theirs.

    Source:
        Cai and Vasconcelos, arXiv:1712.00726; detectron2 `CascadeROIHeads`: overlaps .5, .6 and .7,
        a third of each head's gradient reaches the maps, scores are means over the heads, masks are
        trained on the first head's boxes.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        first_head, predictor = arguments["box_head"], arguments["box_predictor"].cls_score
        width, classes = predictor.in_features, predictor.out_features
        convs = [layer for layer in first_head if hasattr(layer, "out_channels")]
        dim = convs[0].out_channels
        make = partial(
            FastRCNNConvFCHead, (dim, _BOX, _BOX), [dim] * len(convs), [width], norm_layer=NORM
        )
        self.box_head = nn.ModuleList([first_head, *(make() for _ in _OVERLAPS[1:])])
        self.box_predictor = nn.ModuleList(CascadePredictor(width, classes) for _ in _OVERLAPS)

    def forward(
        self,
        features: Maps,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the objects of each image, and in training the losses."""
        losses: dict[str, Tensor] = {}
        boxes, matches, labels, corrections = proposals, None, None, None
        scores = []
        for stage, overlap in enumerate(_OVERLAPS):
            self.box_coder = BoxCoder(_WEIGHTS[stage])
            if targets is not None and self.training:
                if stage == 0:
                    first = self.select_training_samples(boxes, targets)
                    boxes, matches, labels, corrections = first
                else:
                    labels, corrections = self._match(boxes, targets, overlap)
            pooled = _scale_gradient(
                self.box_roi_pool(features, boxes, image_shapes), 1 / len(_OVERLAPS)
            )
            logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
            scores.append(logits.float().softmax(-1))
            if labels is not None:
                of_class, of_box = fastrcnn_loss(logits, deltas, labels, corrections)
                losses |= {f"loss_classifier_{stage}": of_class, f"loss_box_reg_{stage}": of_box}
            if stage + 1 < len(_OVERLAPS):
                boxes = self._corrected(deltas, boxes, image_shapes)
        if self.training:
            assert targets is not None
            losses["loss_mask"] = self._mask_loss(features, image_shapes, first, targets)
            return [], losses
        mean = torch.stack(scores).mean(0).clamp(min=1e-12).log()  # whose softmax is the mean
        found = self.postprocess_detections(mean, deltas, boxes, image_shapes)
        found_boxes, found_scores, found_labels = found
        logits = self._mask_logits(features, found_boxes, image_shapes)
        masks = maskrcnn_inference(logits, found_labels)
        names = ("boxes", "scores", "labels", "masks")
        rows = zip(found_boxes, found_scores, found_labels, masks, strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows], losses

    def _match(
        self, boxes: list[Tensor], targets: Targets, overlap: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match boxes with objects; return their classes and the corrections to learn."""
        self.proposal_matcher = Matcher(overlap, overlap, allow_low_quality_matches=False)
        true = [target["boxes"] for target in targets]
        matches, labels = self.assign_targets_to_proposals(
            boxes, true, [target["labels"] for target in targets]
        )
        self.proposal_matcher = Matcher(_OVERLAPS[0], _OVERLAPS[0], allow_low_quality_matches=False)
        padded = [one if len(one) else one.new_zeros(1, 4) for one in true]
        matched = [one[match] for one, match in zip(padded, matches, strict=True)]
        return labels, list(self.box_coder.encode(matched, boxes))

    def _corrected(
        self, deltas: Tensor, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Return the corrected boxes, which no gradient goes through; a tenth pixel at least."""
        all_boxes = self.box_coder.decode(deltas.detach(), boxes)[:, 0]
        corrected = []
        parts = all_boxes.split([len(one) for one in boxes])
        for one, shape in zip(parts, image_shapes, strict=True):
            clipped = box_ops.clip_boxes_to_image(one, shape)
            # Not removed: the scores of all heads belong to the same boxes.
            corner = torch.maximum(clipped[:, 2:], clipped[:, :2] + 0.1)
            corrected.append(torch.cat([clipped[:, :2], corner], dim=1))
        return corrected

    def _mask_logits(
        self, features: Maps, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled))
        return logits

    def _mask_loss(
        self, features: Maps, image_shapes: list[tuple[int, int]], first: Any, targets: Targets
    ) -> Tensor:
        boxes, matches, labels, _ = first
        chosen = [label > 0 for label in labels]
        boxes, matches = (
            [one[rows] for one, rows in zip(ones, chosen, strict=True)] for ones in (boxes, matches)
        )
        loss: Tensor = maskrcnn_loss(
            self._mask_logits(features, boxes, image_shapes),
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            matches,
        )
        return loss


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x`, whose gradient will be multiplied by a factor."""
    scaled: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


@torch.no_grad()
def paste(found: dict[str, Tensor], *, fitted: tuple[int, int], size: tuple[int, int]) -> Maps:
    """Draw the objects found in a padded image into the stored one.

    Args:
        found: Objects of one image, as `Detector` returns them.
        fitted: Height and width of the image inside the padded one.
        size: Height and width of the stored image.

    Returns:
        `boxes`, `labels`, `scores`, and `masks` [objects, height, width].
    """
    boxes = box_ops.clip_boxes_to_image(found["boxes"].float(), fitted)
    scale = boxes.new_tensor([size[1] / fitted[1], size[0] / fitted[0]] * 2)
    inside = box_ops.remove_small_boxes(boxes, min_size=1e-2)
    boxes = (boxes * scale)[inside]
    probabilities = found["masks"].float()[inside]
    masks = (
        paste_masks_in_image(probabilities, boxes, size)[:, 0] > 0.5
        if len(boxes)
        else torch.zeros(0, *size, dtype=torch.bool, device=boxes.device)
    )
    return {
        "boxes": boxes,
        "labels": found["labels"][inside],
        "scores": found["scores"].float()[inside],
        "masks": masks,
    }
