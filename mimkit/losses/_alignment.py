"""CAE's alignment loss between predicted and encoded latents."""

from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import checked


@checked
def alignment_mse(
    prediction: Float[Tensor, "batch masked dim"], target: Float[Tensor, "batch masked dim"]
) -> Float32[Tensor, ""]:
    """Mean squared error between predicted latents and their targets.

    Args:
        prediction: Predicted latents of the masked positions.
        target: Latents of the encoder; compute them under `torch.no_grad`.

    Returns:
        float32 for inputs of any dtype; 0 (with zero gradient) if nothing is masked.

    Raises:
        ValueError: If the shapes differ; there is no broadcasting.

    Source:
        CAE, arXiv:2202.03026, section 3.2 "latent representation alignment".

    Example:
        >>> import torch
        >>> alignment_mse(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0))
        tensor(9.)
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape; got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    total = F.mse_loss(prediction.float(), target.float(), reduction="sum")
    return total / max(prediction.numel(), 1)
