"""A valid call of every public function, class and method: where the fuzz of arguments starts.

Axes have different sizes, and batches two samples, so that a wrong size is wrong.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import TensorDataset

import mimkit
from mimkit import conv, interop, losses, masking, nn, patches, targets, testing, viz
from mimkit.masking import Key, Mask, RaggedMask, compat, stats

ROOMS = (masking, compat, stats, patches, conv, targets, losses, nn, viz, interop, testing, mimkit)

KEY = masking.key([3, 5], seed=0)
GRID = (2, 3)
MASK = masking.uniform(KEY, GRID, num_masked=2)
RAGGED = masking.ragged(masking.uniform, KEY, GRID, num_masked=[2, 3])
SEED = torch.Generator().manual_seed(0)
IMAGES = torch.rand(2, 3, 8, 12, generator=SEED)
TOKENS = torch.rand(2, 6, 5, generator=SEED)
ROWS = torch.rand(12, 5, generator=SEED)
VISIBLE, MASKED = TOKENS[:, :4], TOKENS[:, :2]
PATCHES = torch.rand(2, 2, 48, generator=SEED)
CLASSES = torch.randint(7, (2, 2), generator=SEED)
LOGITS = torch.rand(2, 2, 7, generator=SEED)
CELLS = torch.rand(2, 4, 4, 5, generator=SEED)
FILTER, BIAS = torch.rand(5, 1, 3, 3, generator=SEED), torch.rand(5, generator=SEED)
VIT = {"image_size": (8, 12), "patch_size": 4, "dim": 8, "depth": 1, "heads": 2}
DECODER = {"grid": GRID, "in_dim": 8, "dim": 16, "depth": 1, "heads": 2}
LATENT = torch.rand(2, 5, 8, generator=SEED)
CONVVIT = {
    "image_size": (8, 12),
    "patch_sizes": (2, 2, 1),
    "dim": (4, 4, 8),
    "depth": (1, 1, 1),
    "heads": 2,
}
SWIN = {"image_size": 8, "patch_size": 2, "dim": 8, "depth": (1, 1), "heads": (1, 2), "window": 2}
SAMPLER = {"key": KEY, "grid": GRID, "ratio": 0.5}
LARGE = {"key": KEY, "grid": (6, 8), "ratio": 0.5}
PIXEL_LOSS = {
    "prediction": PATCHES,
    "images": IMAGES,
    "mask": MASK,
    "patch_size": 4,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
}


def _loss(prediction: Any, target: Any) -> dict[str, Any]:
    return {"prediction": prediction, "target": target, "mask": MASK}


def _built(module: torch.nn.Module) -> torch.nn.Module:
    return module.eval().requires_grad_(False)


def _target_calls(target: Any, values: Any) -> dict[str, Any]:
    name = f"targets.{type(target).__name__}"
    given = {"images": IMAGES, "mask": MASK}
    calls = {f"{name}.__call__": (target.__call__, given)}
    if values is not None:
        calls[f"{name}.invert"] = (target.invert, {"values": values, **given})
    return calls


def public_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any] | list[Any]]]:
    """Return a function and its valid arguments, by name; a second call of one is "name: what"."""
    torch.manual_seed(0)
    vit, swin = _built(nn.ViT(**VIT)), _built(nn.SwinTransformer(**SWIN))
    convvit = _built(nn.ConvViT(**CONVVIT))
    detector = {
        "image_size": (8, 12),
        "window": (2, 3),
        "global_layers": (0,),
        "patch_sizes": (2, 2, 1),
        "dim": (4, 4, 8),
        "depth": (1, 1, 2),
        "heads": 2,
    }
    vae = {"vocabulary_size": 8, "dim": 4, "depth": 1, "groups": 2, "stem_dim": 4}
    tokenizer = {"patch_size": (4, 4), "in_channels": 3, "vocabulary_size": 5}
    fitted_tokenizer = nn.PatchTokenizer(**tokenizer).fit(IMAGES)
    discrete = _built(nn.DiscreteVAE(**vae))
    regressor = {"dim": 8, "depth": 2, "heads": 2}
    head = {"grid": GRID, "dim": 8, "token": (4, 4), "patch": (4, 4), "values": 48}
    inverse = {
        "grid": (2, 4),
        "in_dim": 8,
        "dim": (8, 4),
        "depth": (1, 1),
        "heads": (2, 1),
        "window": 2,
        "out_dim": 6,
    }
    queries, shown = torch.rand(2, 2, 8), torch.rand(2, 4, 8)
    colors = targets.ColorClusters(4, 4).fit(IMAGES)
    components = targets.PCATarget(4, 5).fit(IMAGES)
    table = torch.rand(7, 5)
    whole = torch.rand(2, 7, 8)
    codes = torch.randint(4, (2, 2, 16))
    state = dict(vit.state_dict())
    boxes = torch.tensor([[[0, 0, 1, 2]], [[1, 0, 2, 2]]])
    noise = torch.rand(2, 6)
    calls: dict[str, Any] = {
        "masking.key": (masking.key, {"sample_ids": torch.tensor([3, 5]), "seed": 7, "epoch": 2}),
        "masking.fresh_key": (masking.fresh_key, [3]),
        "masking.Key": (
            Key,
            {"sample_ids": torch.tensor([3, 5, 8]), "seed_and_epoch": KEY.seed_and_epoch},
        ),
        "masking.Key.view": (KEY.view, [1]),
        "masking.Mask": (Mask, [MASK.visible_ids, MASK.masked_ids, GRID]),
        "masking.Mask.from_bool": (Mask.from_bool, {"is_masked": MASK.is_masked}),
        "masking.Mask.from_noise": (Mask.from_noise, [noise, GRID, 2]),
        "masking.Mask.from_visible_ids": (Mask.from_visible_ids, [MASK.visible_ids, GRID]),
        "masking.Mask.from_boxes": (Mask.from_boxes, [boxes, GRID]),
        "masking.Mask.cat": (Mask.cat, [[MASK, MASK]]),
        "masking.Mask.refine": (MASK.refine, [2]),
        "masking.Mask.coarsen": (MASK.refine(2).coarsen, [2]),
        "masking.Mask.complement": (MASK.complement, []),
        "masking.Mask.equal": (MASK.equal, [MASK]),
        "masking.Mask.expand": (MASK[0].expand, [3]),
        "masking.Mask.to": (MASK.to, ["cpu"]),
        "masking.Mask.validate": (MASK.validate, []),
        "masking.RaggedMask": (RaggedMask, dict(vars(RAGGED))),
        "masking.RaggedMask.from_bool": (RaggedMask.from_bool, [RAGGED.is_masked]),
        "masking.RaggedMask.from_visible_ids": (
            RaggedMask.from_visible_ids,
            [[torch.tensor([3, 0]), torch.tensor([1])], [(2, 2), (1, 3)]],
        ),
        "masking.RaggedMask.cat": (RaggedMask.cat, [[MASK, RAGGED]]),
        "masking.RaggedMask.split_visible": (RAGGED.split_visible, [torch.rand(7, 5)]),
        "masking.RaggedMask.split_masked": (RAGGED.split_masked, [torch.rand(5, 5)]),
        "masking.RaggedMask.unbind": (RAGGED.unbind, []),
        "masking.RaggedMask.complement": (RAGGED.complement, []),
        "masking.RaggedMask.equal": (RAGGED.equal, [RAGGED]),
        "masking.RaggedMask.to": (RAGGED.to, ["cpu"]),
        "masking.RaggedMask.validate": (RAGGED.validate, []),
        "masking.MultiBlock": (masking.MultiBlock, {"context": MASK, "targets": [MASK]}),
        "masking.uniform": (masking.uniform, SAMPLER),
        "masking.blockwise": (masking.blockwise, LARGE),
        "masking.gridwise": (masking.gridwise, {"key": KEY, "grid": (6, 8)}),
        "masking.square": (masking.square, {"key": KEY, "grid": (6, 8), "side": 2}),
        "masking.inverse_block": (masking.inverse_block, LARGE),
        "masking.visible_block": (masking.visible_block, LARGE),
        "masking.prefix": (masking.prefix, LARGE),
        "masking.random_prefix": (masking.random_prefix, {"key": KEY, "grid": (6, 8)}),
        "masking.tube": (masking.tube, {"key": KEY, "grid": (4, 2, 3), "ratio": 0.5}),
        "masking.weighted": (masking.weighted, {**SAMPLER, "weights": noise}),
        "masking.multiblock": (masking.multiblock, {"key": KEY, "grid": (6, 8), "num_targets": 2}),
        "masking.complementary": (masking.complementary, {"key": KEY, "grid": GRID, "parts": 3}),
        "masking.ragged": (
            masking.ragged,
            {
                "sampler": masking.uniform,
                "key": KEY,
                "grids": [(2, 3), (2, 2)],
                "ratios": [0.5, 0.5],
            },
        ),
        "masking.num_masked": (masking.num_masked, {"num_tokens": 196, "ratio": 0.75}),
        "masking.with_ids": (masking.with_ids, [TensorDataset(torch.zeros(4, 2))]),
        "masking.philox4x32": (
            masking.philox4x32,
            [[torch.tensor([1, 2])] * 2, [torch.tensor([3, 4])] * 4],
        ),
        **{f"compat.{n}": (getattr(compat, n), LARGE) for n in ("beit", "cae", "mmpretrain")},
        **{
            f"compat.{n}": (getattr(compat, n), {"key": KEY, "grid": (9, 8), "num_targets": 2})
            for n in ("ijepa", "ijepa_targets")
        },
        "stats.average_distance": (stats.average_distance, {"mask": MASK, "patch_size": 4}),
        "stats.marginals": (
            stats.marginals,
            {"sampler": masking.gridwise, "grid": GRID, "num_samples": 8},
        ),
        "patches.gather_visible": (patches.gather_visible, {"tokens": TOKENS, "mask": MASK}),
        "patches.gather_visible: ragged": (
            patches.gather_visible,
            {"tokens": ROWS, "mask": RAGGED},
        ),
        "patches.gather_masked": (patches.gather_masked, {"tokens": TOKENS, "mask": MASK}),
        "patches.gather_masked: ragged": (patches.gather_masked, {"tokens": ROWS, "mask": RAGGED}),
        "patches.restore": (
            patches.restore,
            {"visible": VISIBLE, "mask": MASK, "fill": MASKED, "positions": TOKENS[0]},
        ),
        "patches.restore: one fill": (
            patches.restore,
            {"visible": VISIBLE, "mask": MASK, "fill": BIAS, "positions": TOKENS[0]},
        ),
        "patches.restore: ragged": (
            patches.restore,
            {"visible": ROWS[:7], "mask": RAGGED, "fill": ROWS[:5], "positions": ROWS},
        ),
        "patches.grid_of": (patches.grid_of, {"images": IMAGES, "patch_size": 4}),
        "patches.patchify": (patches.patchify, {"images": IMAGES, "patch_size": (4, 4)}),
        "patches.unpatchify": (patches.unpatchify, [torch.rand(2, 6, 48), GRID, 4]),
        "patches.gather_patches": (
            patches.gather_patches,
            {"images": IMAGES, "mask": MASK, "patch_size": 4, "mean": [0.4] * 3, "std": [0.2] * 3},
        ),
        "patches.gather_patches: ragged": (
            patches.gather_patches,
            {"images": list(IMAGES), "mask": RAGGED, "patch_size": 4},
        ),
        "patches.sincos_positions": (patches.sincos_positions, {"dim": 8, "grid": GRID}),
        "patches.interpolate_positions": (
            patches.interpolate_positions,
            {"table": table, "old_grid": GRID, "new_grid": (3, 4), "num_prefix": 1},
        ),
        "patches.interpolate_relative_positions": (
            patches.interpolate_relative_positions,
            {"table": torch.rand(49, 2), "old_grid": (4, 4), "new_grid": (6, 5)},
        ),
        "patches.pack_cells": (
            patches.pack_cells,
            {"feature_map": torch.rand(2, 5, 4, 6), "mask": MASK},
        ),
        "patches.unpack_cells": (patches.unpack_cells, {"cells": CELLS, "mask": MASK}),
        "patches.neighbors": (patches.neighbors, {"mask": MASK, "reach": 1}),
        "conv.masked_depthwise_conv2d": (
            conv.masked_depthwise_conv2d,
            {"x": torch.rand(2, 5, 4, 6), "weight": FILTER, "bias": BIAS, "mask": MASK},
        ),
        "conv.packed_depthwise_conv2d": (
            conv.packed_depthwise_conv2d,
            {
                "cells": CELLS,
                "weight": FILTER,
                "bias": BIAS,
                "cell": 2,
                "neighbors": patches.neighbors(MASK),
            },
        ),
        "losses.masked_mse": (losses.masked_mse, _loss(TOKENS[:, :2], MASKED + 1)),
        "losses.masked_mse: ragged": (losses.masked_mse, [ROWS[:5], ROWS[5:10], RAGGED]),
        "losses.masked_l1": (losses.masked_l1, _loss(TOKENS, TOKENS + 1)),
        "losses.masked_smooth_l1": (losses.masked_smooth_l1, _loss(MASKED, MASKED + 1)),
        "losses.masked_cosine": (losses.masked_cosine, _loss(MASKED, MASKED + 1)),
        "losses.masked_cross_entropy": (losses.masked_cross_entropy, _loss(LOGITS, CLASSES)),
        "losses.masked_pixel_loss": (losses.masked_pixel_loss, PIXEL_LOSS),
        "losses.alignment_mse": (losses.alignment_mse, [MASKED, MASKED + 1]),
        "losses.linear_cross_entropy": (
            losses.linear_cross_entropy,
            [torch.rand(2, 2, 5), torch.rand(7, 5), torch.rand(7), CLASSES],
        ),
        "losses.baselines": (
            losses.baselines,
            {"images": IMAGES, "mask": MASK, "patch_size": 4},
        ),
        "targets.Pixels": (targets.Pixels, {"patch_size": 4, "mean": [0.4] * 3, "std": [0.2] * 3}),
        "targets.NormalizedPixels": (targets.NormalizedPixels, {"patch_size": 4}),
        "targets.DownsampledPixels": (targets.DownsampledPixels, {"patch_size": 4, "factor": 2}),
        "targets.WindowNormalizedPixels": (targets.WindowNormalizedPixels, {"patch_size": 4}),
        "targets.ChannelBins": (targets.ChannelBins, {"patch_size": 4}),
        "targets.ColorClusters": (targets.ColorClusters, {"patch_size": 4, "num_clusters": 4}),
        "targets.PCATarget": (targets.PCATarget, {"patch_size": 4, "num_components": 5}),
        "targets.HOG": (targets.HOG, {"patch_size": 4, "cell": 2}),
        "targets.FeatureTarget": (targets.FeatureTarget, {"teacher": vit, "num_prefix": 1}),
        "targets.TokenTarget": (
            targets.TokenTarget,
            {"encode": fitted_tokenizer.encode, "decode": lambda ids: ids, "patch_size": 4},
        ),
        **_target_calls(targets.Pixels(4, mean=[0.4] * 3, std=[0.2] * 3), PATCHES),
        **_target_calls(targets.NormalizedPixels(4), PATCHES),
        **_target_calls(targets.DownsampledPixels(4, 2), torch.rand(2, 2, 12)),
        "targets.DownsampledPixels.group": (targets.DownsampledPixels(4, 2).group, [MASK]),
        **_target_calls(targets.WindowNormalizedPixels(4, 3), PATCHES),
        **_target_calls(targets.ChannelBins(4), torch.randint(8, (2, 2, 48))),
        **_target_calls(colors, codes),
        "targets.ColorClusters.fit": (
            targets.ColorClusters(4, 4).fit,
            {"images": IMAGES, "initial": torch.rand(4, 3)},
        ),
        **_target_calls(components, torch.rand(2, 2, 5)),
        "targets.PCATarget.fit": (targets.PCATarget(4, 5).fit, [IMAGES]),
        **_target_calls(targets.HOG(4, 2), None),
        **_target_calls(targets.FeatureTarget(vit, 1), None),
        **_target_calls(
            targets.TokenTarget(
                fitted_tokenizer.encode, lambda ids: torch.ones(len(ids), 3, 8, 12), 4
            ),
            CLASSES,
        ),
        "nn.ViT": (nn.ViT, VIT),
        "nn.ViT.forward": (vit, {"images": IMAGES, "mask": MASK}),
        "nn.ViT.forward: mask token": (
            vit,
            {"images": IMAGES, "mask": MASK, "mask_token": torch.rand(8)},
        ),
        "nn.ViT.forward: ragged": (vit, {"images": list(IMAGES), "mask": RAGGED}),
        "nn.ViT.features": (vit.features, [IMAGES]),
        "nn.ViT.pool": (vit.pool, [whole]),
        "nn.SwinTransformer": (nn.SwinTransformer, SWIN),
        "nn.SwinTransformer.forward": (
            swin,
            {
                "images": torch.rand(2, 3, 8, 8),
                "mask_token": torch.rand(8),
                "mask": masking.uniform(KEY, (4, 4), 0.5),
            },
        ),
        "nn.SwinTransformer.features": (swin.features, [torch.rand(2, 3, 8, 8)]),
        "nn.SwinTransformer.pool": (swin.pool, [torch.rand(2, 4, 16)]),
        "nn.ConvViT": (nn.ConvViT, CONVVIT),
        "nn.ConvViT.forward": (convvit, {"images": IMAGES, "mask": MASK}),
        "nn.ConvViT.features": (convvit.features, [IMAGES]),
        "nn.ConvViT.pool": (convvit.pool, [whole]),
        "nn.ConvViTDetector": (nn.ConvViTDetector, detector),
        "nn.ConvViTDetector.forward": (_built(nn.ConvViTDetector(**detector)), [IMAGES]),
        "nn.FeaturePyramid": (nn.FeaturePyramid, {"dim": 8, "out_dim": 4, "scales": (2, 1)}),
        "nn.FeaturePyramid.forward": (
            _built(nn.FeaturePyramid(dim=8, out_dim=4, scales=(2, 1))),
            [torch.rand(2, 8, 2, 3)],
        ),
        "nn.UPerHead": (nn.UPerHead, {"in_dims": (4, 8), "num_classes": 3, "dim": 4}),
        "nn.UPerHead.forward": (
            _built(nn.UPerHead(in_dims=(4, 8), num_classes=3, dim=4)),
            [[torch.rand(2, 4, 4, 6), torch.rand(2, 8, 2, 3)]],
        ),
        "nn.FCNHead": (nn.FCNHead, {"in_dim": 8, "num_classes": 3, "dim": 4}),
        "nn.FCNHead.forward": (
            _built(nn.FCNHead(in_dim=8, num_classes=3, dim=4)),
            [torch.rand(2, 8, 2, 3)],
        ),
        "nn.MAEDecoder": (nn.MAEDecoder, DECODER),
        "nn.MAEDecoder.forward": (_built(nn.MAEDecoder(**DECODER)), [LATENT, MASK]),
        "nn.CrossDecoder": (nn.CrossDecoder, DECODER),
        "nn.CrossDecoder.forward": (
            _built(nn.CrossDecoder(**DECODER)),
            {"latent": LATENT, "mask": MASK, "query_ids": MASK.masked_ids},
        ),
        "nn.PixelHead": (nn.PixelHead, {"dim": 8, "patch_size": 4, "in_channels": 3}),
        "nn.TokenHead": (nn.TokenHead, {"dim": 8, "vocabulary_size": 7}),
        "nn.TokenHead.forward": (
            _built(nn.TokenHead(dim=8, vocabulary_size=7)),
            {"x": torch.rand(2, 2, 8), "target": CLASSES},
        ),
        "nn.AttentiveProbe": (nn.AttentiveProbe, {"dim": 8, "heads": 2, "num_classes": 3}),
        "nn.AttentiveProbe.forward": (
            _built(nn.AttentiveProbe(dim=8, heads=2, num_classes=3)),
            [whole],
        ),
        "nn.AttentiveProbe.attention": (
            _built(nn.AttentiveProbe(dim=8, heads=2, num_classes=3)).attention,
            [whole],
        ),
        "nn.ContextRegressor": (nn.ContextRegressor, regressor),
        "nn.ContextRegressor.forward": (
            _built(nn.ContextRegressor(**regressor)),
            [queries, shown, queries + 1, shown + 1],
        ),
        "nn.ContextRegressor.from_mask_token": (
            _built(nn.ContextRegressor(**regressor)).from_mask_token,
            [torch.rand(8), shown, torch.rand(6, 8), MASK],
        ),
        "nn.CAEDecoder": (nn.CAEDecoder, regressor),
        "nn.CAEDecoder.forward": (_built(nn.CAEDecoder(**regressor)), [queries, queries + 1]),
        "nn.TransformerBlock": (nn.TransformerBlock, {"dim": 8, "heads": 2}),
        "nn.TransformerBlock.forward": (_built(nn.TransformerBlock(dim=8, heads=2)), [whole]),
        "nn.RelativePositionBias": (nn.RelativePositionBias, {"grid": GRID, "heads": 2}),
        "nn.RelativePositionBias.forward": (
            _built(nn.RelativePositionBias(grid=GRID, heads=2)),
            [MASK],
        ),
        "nn.PatchEmbed": (nn.PatchEmbed, {"patch_size": 4, "in_channels": 3, "dim": 8}),
        "nn.PatchEmbed.forward": (
            _built(nn.PatchEmbed(patch_size=4, in_channels=3, dim=8)),
            {"images": IMAGES, "mask": MASK},
        ),
        "nn.PatchEmbed.normalize_bytes": (
            nn.PatchEmbed(patch_size=4, in_channels=3, dim=8).normalize_bytes,
            {"mean": [0.5] * 3, "std": [0.25] * 3},
        ),
        "nn.ConvStem": (nn.ConvStem, {"in_channels": 3, "channels": (4, 8)}),
        "nn.DiscreteVAE": (nn.DiscreteVAE, vae),
        "nn.DiscreteVAE.forward": (discrete, [torch.rand(2, 3, 8, 16)]),
        "nn.DiscreteVAE.encode": (discrete.encode, [torch.rand(2, 3, 8, 16)]),
        "nn.DiscreteVAE.decode": (discrete.decode, [torch.randint(8, (2, 4, 5))]),
        "nn.PatchTokenizer": (nn.PatchTokenizer, tokenizer),
        "nn.PatchTokenizer.fit": (nn.PatchTokenizer(**tokenizer).fit, [IMAGES]),
        "nn.PatchTokenizer.encode": (fitted_tokenizer.encode, [IMAGES]),
        "nn.PatchTokenizer.decode": (
            fitted_tokenizer.decode,
            {"ids": torch.randint(5, (2, 2, 3)), "like": IMAGES},
        ),
        "nn.SimMIMHead": (nn.SimMIMHead, head),
        "nn.SimMIMHead.forward": (_built(nn.SimMIMHead(**head)), [torch.rand(2, 6, 8), MASK]),
        "nn.InverseSwin": (nn.InverseSwin, inverse),
        "nn.InverseSwin.forward": (_built(nn.InverseSwin(**inverse)), [torch.rand(2, 8, 8)]),
        "viz.show_masked": (viz.show_masked, {"images": IMAGES, "mask": MASK, "patch_size": 4}),
        "viz.fill_masked": (viz.fill_masked, [IMAGES, MASK, PATCHES, 4]),
        "viz.half_mass": (viz.half_mass, [torch.rand(2, 2, 3)]),
        "viz.show_attention": (viz.show_attention, [IMAGES, torch.rand(2, 2, 3)]),
        "viz.panel": (viz.panel, [[[torch.rand(3, 8, 12)]], ["a"]]),
        "viz.curves": (
            viz.curves,
            {"steps": [1.0, 2.0], "series": {"a": [1.0, 2.0]}, "title": "t"},
        ),
        "interop.to_timm": (interop.to_timm, [state]),
        "interop.from_timm": (interop.from_timm, [dict(interop.to_timm(state))]),
        "mimkit.container": (mimkit.container, [type("Output", (), {"__annotations__": {}})]),
    }
    return calls


def public_names() -> Iterator[str]:
    """Yield the public functions, classes and methods of all rooms, as the keys of the calls."""
    for room in ROOMS:
        short = room.__name__.split(".")[-1]
        for name in getattr(room, "__all__", None) or _own_names(room):
            value = getattr(room, name)
            if callable(value):
                yield f"{short}.{name}"
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    is_public = not method.startswith("_") or method == "__call__"
                    if is_public and inspect.isroutine(inspect.unwrap(_plain(function))):
                        yield f"{short}.{name}.{method}"


def _plain(function: Any) -> Any:
    return function.__func__ if isinstance(function, classmethod | staticmethod) else function


def _own_names(room: Any) -> list[str]:
    members = inspect.getmembers(importlib.import_module(room.__name__), callable)
    return [n for n, v in members if v.__module__ == room.__name__ and not n.startswith("_")]
