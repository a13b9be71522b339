# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Masks, and how far a hidden pixel is from a visible one
#
# A mask is a function of (seed, epoch, sample id). Draw five samples twice: the bits are equal.

# %%
import torch

from mimkit import masking, viz
from mimkit.masking import stats

key = masking.key([0, 1, 2, 3, 4], seed=0, epoch=3)
mask = masking.uniform(key, (14, 14), 0.75)
assert mask.equal(masking.uniform(key, (14, 14), 0.75))
alone = masking.uniform(masking.key([3], seed=0, epoch=3), (14, 14), 0.75)
assert alone.equal(mask[3:4])  # the batch does not matter

# %% [markdown]
# Six samplers on one grid. White tokens are visible.

# %%
SAMPLERS = {
    "uniform .75": masking.uniform(key, (14, 14), 0.75),
    "unit 2, .6": masking.uniform(key, (14, 14), 0.6, unit=2),
    "blockwise .5": masking.blockwise(key, (14, 14), 0.5),
    "inverse .8": masking.inverse_block(key, (14, 14), 0.8),
    "gridwise": masking.gridwise(key, (14, 14)),
    "multiblock": masking.multiblock(key, (14, 14)).context,
}


def tile(mask, sample):
    """Draw one sample's mask, eight pixels a token."""
    visible = (~mask.is_masked[sample]).float()
    return visible.repeat_interleave(8, 0).repeat_interleave(8, 1).unsqueeze(0)


rows = [[tile(mask, sample) for mask in SAMPLERS.values()] for sample in range(3)]
picture = viz.panel(rows, list(SAMPLERS))
picture

# %% [markdown]
# AvgDist (SimMIM, section 4.1.2) is the mean distance in pixels from a masked pixel to the nearest
# visible one. SimMIM's best scores lie at 10 to 20 pixels, for masks of any kind.

# %%
distances = {name: float(stats.average_distance(mask, 16)) for name, mask in SAMPLERS.items()}
for name, distance in distances.items():
    print(f"{name:14}{distance:6.1f} pixels")
assert distances["gridwise"] < distances["uniform .75"] < distances["inverse .8"]

# %% [markdown]
# The rate at which each token is masked. Blocks lie inside the image, so they mask its center more.

# %%
rates = stats.marginals(masking.blockwise, (14, 14), 0.5, num_samples=1024)
print(f"corner {rates[0, 0]:.2f}, center {rates[7, 7]:.2f}")
assert rates[0, 0] < rates[7, 7]
heat = rates.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
viz.panel([[1 - heat, torch.full_like(heat, 0.5)]], ["blockwise .5", "every token alike"])
