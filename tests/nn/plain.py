"""A plain reference transformer, computed from a module's weights only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def norm(tokens: Tensor, weights: dict[str, Tensor], name: str, eps: float = 1e-6) -> Tensor:
    mean = tokens.mean(dim=-1, keepdim=True)
    variance = tokens.var(dim=-1, keepdim=True, correction=0)
    normal = (tokens - mean) / (variance + eps).sqrt()
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(tokens: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(tokens: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """Attention with a loop over heads."""
    query, key, value = linear(tokens, weights, f"{name}.qkv").chunk(3, dim=-1)
    attended = []
    for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in (query, key, value)), strict=True):
        attended.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
    return linear(torch.cat(attended, dim=-1), weights, f"{name}.proj")


def block(tokens: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    normal = norm(tokens, weights, f"{name}.norm1")
    tokens = tokens + attention(normal, weights, f"{name}.attn", heads)
    hidden = linear(norm(tokens, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return tokens + linear(hidden, weights, f"{name}.mlp.fc2")


def embed_patches(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Embed all patches by a convolution, as timm's `PatchEmbed` does."""
    weight, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    convolve = CONVOLUTIONS[images.ndim - 2]
    return convolve(images, weight, bias, stride=weight.shape[2:]).flatten(2).mT


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter, because zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
