# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # An attentive probe, and where it looks
#
# An attentive probe (CAE, section 4.2) is one cross-attention with a learned query a class over an
# encoder's frozen tokens. Its weights show which patches decide. Here the encoder is not trained at
# all, to keep this short; put the weights of a run into it for better maps.

# %%
import torch
from skimage import data
from torch.nn import functional as F

from mimkit import nn, viz

torch.manual_seed(0)
PHOTOS = [data.astronaut(), data.coffee(), data.chelsea()]


def crops(photo, number, generator):
    """Cut random squares of 96 pixels out of a photograph, normalised by themselves."""
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255
    height, width = image.shape[1:]
    cut = []
    for _ in range(number):
        top = int(torch.randint(height - 96, (), generator=generator))
        left = int(torch.randint(width - 96, (), generator=generator))
        cut.append(image[:, top : top + 96, left : left + 96])
    squares = torch.stack(cut)
    deviation, mean = torch.std_mean(squares, (2, 3), keepdim=True)
    return (squares - mean) / (deviation + 1e-6)


generator = torch.Generator().manual_seed(0)
images = torch.cat([crops(photo, 40, generator) for photo in PHOTOS])
labels = torch.arange(3).repeat_interleave(40)
is_test = torch.arange(120) % 4 == 0

# %% [markdown]
# Frozen tokens, computed once: `[images, class token + patches, width]`.

# %%
encoder = nn.ViT(image_size=96, patch_size=8, dim=96, depth=3, heads=4).eval()
with torch.no_grad():
    tokens = encoder(images)
print(tuple(tokens.shape))

# %%
probe = nn.AttentiveProbe(dim=96, heads=4, num_classes=3)
optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3)
for _ in range(60):
    loss = F.cross_entropy(probe(tokens[~is_test]), labels[~is_test])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    accuracy = (probe(tokens[is_test]).argmax(1) == labels[is_test]).float().mean()
print(f"{accuracy:.0%} of held-out crops, chance is 33%")
assert accuracy > 0.5

# %% [markdown]
# The attention over patches, mean over heads. The line encloses the patches that hold half of it.

# %%
shown = images[is_test][::10]
with torch.no_grad():
    attention = probe.attention(tokens[is_test][::10]).mean(dim=1)[:, -144:].unflatten(1, (12, 12))
low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
bright = (shown - low) / (high - low)
rows = [[*bright], [*viz.show_attention(bright, attention)]]
viz.panel(rows, [""] * len(shown), note="Above: crops. Below: where the probe looks.")
