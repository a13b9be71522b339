# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # A masked autoencoder on your own folder of images
#
# Set FOLDER to a folder of images: flat, or `train/<class>/*.jpg`. As an example, this writes crops
# of a bundled photograph into one. Run it in a checkout (`recipes` must be importable).

# %%
from pathlib import Path

from PIL import Image
from skimage import data

FOLDER, OUT = Path("my-images"), Path("my-run")
if not FOLDER.exists():
    FOLDER.mkdir()
    photo = Image.fromarray(data.astronaut())
    for number in range(64):
        left, top = 48 * (number % 8), 48 * (number // 8)
        photo.crop((left, top, left + 128, top + 128)).save(FOLDER / f"{number:03}.png")

# %% [markdown]
# What would it cost? A dry run prints parameters, FLOPs and memory, and trains nothing.

# %%
from recipes import mae
from recipes.engine import run

OPTIONS = [
    "--data",
    str(FOLDER),
    "--out",
    str(OUT),
    "--batch-size",
    "16",
    "--max-steps",
    "40",
    "--epochs",
    "20",
]
assert run(mae.RECIPE, "MAE", [*OPTIONS, "--dry-run"]) == 0

# %% [markdown]
# Train. A run that is interrupted continues where it was when the same command is given again.

# %%
assert run(mae.RECIPE, "MAE", OPTIONS) == 0

# %% [markdown]
# Reconstructions of images that were held out, and the curves.

# %%
Image.open(OUT / "reconstructions.png")

# %%
Image.open(OUT / "curves.png")

# %% [markdown]
# The encoder, for use anywhere: plain `state_dict` names, no pickle.

# %%
import json

from mimkit import interop

weights = interop.load_checkpoint(OUT / "encoder.safetensors")
print(len(weights), "tensors;", json.loads((OUT / "summary.json").read_text())["steps"], "steps")
