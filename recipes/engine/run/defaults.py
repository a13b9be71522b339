"""What a recipe leaves to its model's target (see `recipes.engine.targets`).

Axes: batch; channels; *spatial.
"""

from typing import Any

from jaxtyping import Float, Float32
from torch import Tensor

from mimkit import viz
from mimkit.masking import Mask, RaggedMask


def fit(model: Any, images: Float[Tensor, "batch channels *spatial"]) -> None:
    """Let the target learn from some model inputs what it needs."""
    _target_of(model).fit(images)


def baselines(
    model: Any, images: Float[Tensor, "batch channels *spatial"], mask: Mask
) -> dict[str, Float32[Tensor, ""]]:
    """Score trivial predictors under the model's loss."""
    scores: dict[str, Tensor] = _target_of(model).baselines(images, mask)
    return scores


def reconstruct(
    model: Any, images: Float[Tensor, "batch channels *spatial"], mask: Mask, **more: Any
) -> Float[Tensor, "batch channels *spatial"]:
    """Fill in the masked patches; leave them gray where there is no way back to pixels.

    Args:
        model: The model.
        images: Model inputs; also of another size than the encoder's, if it takes a `RaggedMask`.
        mask: Which patches are masked.
        more: More arguments of the model.
    """
    patch_size = [size // n for size, n in zip(images.shape[2:], mask.grid, strict=True)]
    size = tuple(images.shape[2:])
    if getattr(getattr(model, "encoder", None), "image_size", size) == size:
        prediction = model(images, mask, **more).prediction.float()
    else:
        packed = model(images, RaggedMask.cat([mask]), **more).prediction.float()
        prediction = packed.unflatten(0, (len(images), -1))
    try:
        patches = _target_of(model).invert(prediction, images, mask)
    except NotImplementedError:
        return viz.show_masked(images, mask, patch_size, color=0.0)
    return viz.fill_masked(images, mask, patches, patch_size)


def note(model: Any) -> str:
    """Say what a viewer of reconstructions must know."""
    text: str = _target_of(model).note
    return text


def _target_of(model: Any) -> Any:
    """Return a model's target.

    Raises:
        TypeError: If it has none.
    """
    if getattr(model, "target", None) is None:
        raise TypeError(
            f"{type(model).__name__} has no target (see recipes.engine.targets): add one, or give "
            "fit, baselines, reconstruct and note to the Recipe"
        )
    return model.target
