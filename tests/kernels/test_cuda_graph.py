"""A training step in a CUDA graph: nothing synchronizes or depends on values."""

import torch

from mimkit import masking
from mimkit.losses import linear_cross_entropy, masked_pixel_loss
from mimkit.masking import Key
from mimkit.patches import gather_patches, gather_visible, restore
from tests.kernels.harness import needs_gpu


@needs_gpu
def test_captured_step_replays_with_new_keys():
    key = masking.key(torch.arange(8, device="cuda"), seed=0)
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, device="cuda")
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    weight = torch.randn(768, 768, device="cuda", requires_grad=True)
    fill = torch.randn(768, device="cuda", requires_grad=True)
    words = torch.zeros(8, 16, dtype=torch.int64, device="cuda")

    def step(key: Key) -> tuple[torch.Tensor, ...]:
        mask = masking.uniform(key, (4, 4), 0.75)
        visible = gather_patches(images, mask, 16, **statistics) @ weight
        tokens = restore(visible, mask, fill)
        hidden = gather_visible(tokens, mask.complement())
        loss = masked_pixel_loss(hidden, images, mask, 16, **statistics)
        loss = loss + linear_cross_entropy(tokens, weight, None, words)
        return loss.detach(), *torch.autograd.grad(loss, (weight, fill))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(key)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(key)
    for seed in (0, 5):
        key.seed_and_epoch.copy_(masking.key([0], seed=seed, epoch=seed).seed_and_epoch)
        graph.replay()
        for result, expected in zip(captured, step(key), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
