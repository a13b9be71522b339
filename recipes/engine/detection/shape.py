"""Sizes of a detector, and how it is trained; known without torchvision."""

from dataclasses import dataclass

from recipes.engine import fields
from recipes.engine.fields import FieldError, check_fields
from recipes.engine.run.config import Training


@dataclass(frozen=True)
class DetectorShape:
    """Sizes of a detector.

    Attributes:
        window: Tokens per axis of the encoder's attention windows; 0 for global attention. A
            ViT with windows has no class token, as in ViTDet.
        global_blocks: Blocks with global attention in spite of `window`.
        dim: Channels of the feature pyramid and of the heads.
        fc_dim: Width of the last layer of the box head.
        convs: Convolutions of the box head and of the mask head.
        anchors: Side of the anchors on each level of the pyramid, in pixels. A box of 7
            times the first side is pooled from the level of stride 16, as is usual for 224 pixels.
        proposals: Proposals an image after suppression; twice as many a level before.
        samples: Boxes an image on which the box head is trained.
        detections: Largest number of objects found in an image.
        least_score: Score from which an object counts as found.
        cascade: Whether there is a cascade of three box heads (Cascade R-CNN).
    """

    window: fields.NonNegativeInt = 14
    global_blocks: tuple[fields.NonNegativeInt, ...] = (2, 5, 8, 11)
    dim: fields.Width = 256
    fc_dim: fields.Width = 1024
    convs: fields.PositiveInt = 4
    anchors: tuple[fields.Pixels, ...] = (32, 64, 128, 256, 512)
    proposals: fields.PositiveInt = 1000
    samples: fields.PositiveInt = 512
    detections: fields.PositiveInt = 100
    least_score: fields.Fraction = 0.05
    cascade: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DetectionTraining(Training):
    """How a detector is trained.

    Attributes:
        layer_decay: Factor from each layer's learning rate to that of the layer before it.
        drop_path: Fraction of samples whose residual branches the last block leaves out.
        jitter: Smallest and largest scale of large-scale jitter; 1 is the scale at which the image
            fits.
    """

    betas: tuple[fields.Beta, fields.Beta] = (0.9, 0.999)
    weight_decay: fields.NonNegativeFloat = 0.1
    layer_decay: fields.Fraction = 1.0
    drop_path: fields.Fraction = 0.1
    jitter: tuple[fields.PositiveFloat, fields.PositiveFloat] = (0.1, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jitter[0] > self.jitter[1] or self.jitter[1] > 10:
            raise FieldError(
                "jitter", self.jitter, "two scales of at most 10, the smaller one first"
            )
