"""CAE's model: what it computes and what it does not; its recipe, its tokenizers, its mistakes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimkit import masking
from mimkit.interop import to_official
from mimkit.masking import Mask
from mimkit.nn import DiscreteVAE
from mimkit.patches import unpatchify
from mimkit.targets import FeatureTarget, NormalizedPixels
from mimkit.testing import assert_no_leak, assert_samples_isolated
from recipes import tokenizer
from recipes.cae import CAE, RECIPE, CAEConfig, build_with_target, decode_full
from recipes.engine import run
from recipes.engine.errors import UserError
from recipes.engine.pretrained.encoders import load_encoder
from recipes.engine.pretrained.shapes import ViTShape
from recipes.engine.pretrained.tokenizers import ImageTokenizer, to_inputs, to_pixels
from tests.recipes.command import check_command
from tests.strategies import keys

SHAPE = CAEConfig(
    image_size=(16, 24),
    patch_size=4,
    dim=24,
    depth=2,
    heads=2,
    regressor_depth=2,
    decoder_dim=24,
    decoder_depth=1,
    decoder_heads=2,
    vocabulary_size=16,
)
GRID = (4, 6)


def build(**changes: object) -> CAE:
    torch.manual_seed(0)
    return CAE(dataclasses.replace(SHAPE, **changes))


def draw(batch: int = 3) -> tuple[Tensor, Mask, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 16, 24, generator=generator)
    ids = torch.randint(16, (batch, 24), generator=generator)
    return images, masking.blockwise(masking.key(range(batch), seed=0), GRID, 0.4), ids


@given(keys())
def test_the_target_is_what_the_encoder_makes_of_the_masked_patches(key):
    model = build(decoder_dim=32)  # with a projection
    images = torch.randn(key.batch_size, 3, 16, 24)
    mask = masking.uniform(key, GRID, 0.4)
    ids = torch.zeros(key.batch_size, 24, dtype=torch.int64)
    output = model(images, mask, ids)
    expected = model.project(model.encoder(images, ~mask)[:, 1:])
    torch.testing.assert_close(output.latent_target, expected)
    assert not output.latent_target.requires_grad
    assert output.latent_prediction.shape == output.latent_target.shape


def test_alignment_reaches_neither_decoder_nor_head_and_there_is_no_second_encoder():
    model = build()
    model(*draw()).alignment_loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in reached if name.startswith(("decoder.", "head."))]
    assert [name for name in reached if name.startswith("encoder.")]
    tables = [name for name, _ in model.named_parameters() if name.endswith("pos_embed")]
    assert tables == ["pos_embed", "encoder.pos_embed"]


@pytest.mark.parametrize("changes", [{"no_alignment": True}, {"alignment_weight": 0.0}])
def test_without_alignment_the_encoder_runs_once(changes):
    model, calls = build(**changes), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    output = model(*draw())
    assert len(calls) == 1
    assert output.latent_target is None
    assert float(output.alignment_loss) == 0
    assert torch.equal(output.loss, output.main_loss)


def test_without_a_decoder_the_head_reads_the_regressors_output():
    model = build(no_decoder=True)
    images, mask, ids = draw()
    output = model(images, mask, ids, return_logits=True)
    positions = model.pos_embed[0, 1:][mask.masked_ids]
    expected = model.head(model.decoder.norm(output.latent_prediction + positions))
    torch.testing.assert_close(output.prediction, expected)


def test_pixels_can_be_predicted_instead_of_tokens():
    images, mask, _ = draw()
    output = build(target="rgb")(images, mask)
    assert output.prediction.shape == (3, mask.num_masked, 48)
    assert output.token_accuracy is None
    assert output.main_loss > 0


def test_features_of_a_teacher_are_scored_by_their_direction():
    images, mask, _ = draw()
    model = build(target="features", feature_dim=5)
    target = FeatureTarget(lambda images: images[:, :1].reshape(3, 24, 16)[:, :, :5])
    features = target(images, mask)
    output = model(images, mask, features=features)
    assert output.prediction.shape == features.shape
    assert output.token_accuracy is None
    expected = 1 - nn.functional.cosine_similarity(output.prediction, features, dim=2).mean()
    torch.testing.assert_close(output.main_loss, expected)
    output.main_loss.backward()
    assert model.head.weight.grad.norm() > 0
    assert model.mask_token.grad.norm() > 0


def test_logits_exist_only_where_they_are_asked_for():
    inputs = draw()
    assert build()(*inputs).prediction is None
    output = build()(*inputs, return_logits=True)
    ids = inputs[2].gather(1, inputs[1].masked_ids)
    expected = nn.functional.cross_entropy(output.prediction.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(output.main_loss, expected)


def test_paths_are_dropped_in_the_target_too_unless_switched_off():
    images, mask, ids = draw(8)
    for switch in (True, False):
        model = build(drop_path=0.5, alignment_drop_path=switch).train()
        targets = [model(images, mask, ids).latent_target for _ in range(2)]
        assert torch.equal(*targets) is not switch
        assert model.encoder.training


def test_the_encoder_neither_sees_masked_patches_nor_mixes_samples():
    model = build().eval()
    images, mask, _ = draw()
    assert_no_leak(model.encoder, images, mask)
    assert_samples_isolated(model.encoder, images, mask)


def test_a_list_of_masks_gives_mask_major_outputs():
    model = build().eval()
    images, mask, ids = draw()
    masks = [mask, masking.uniform(masking.key(range(3), seed=5), GRID, num_masked=mask.num_masked)]
    together = model(images, masks, ids, return_logits=True)
    alone = [model(images, one, ids, return_logits=True) for one in masks]
    for name in ("prediction", "latent", "latent_target", "latent_prediction"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in alone])
        )
    torch.testing.assert_close(together.loss, (alone[0].loss + alone[1].loss) / 2)


def test_the_whole_image_goes_through_encoder_and_decoder():
    model = build_with_target(dataclasses.replace(SHAPE, target="rgb"))
    images, _, _ = draw()
    positions = model.pos_embed[:, 1:].expand(3, -1, -1)
    patches = model.head(model.decoder(model.encoder(images)[:, 1:], positions))
    everything = Mask.from_visible_ids(torch.zeros(3, 0, dtype=torch.int64), GRID)
    expected = NormalizedPixels(4).invert(patches, images, everything)
    drawn = decode_full(model, images)["encoder + decoder"]
    torch.testing.assert_close(drawn, unpatchify(expected, GRID, 4))


@pytest.mark.full
def test_the_model_traces_into_one_graph():
    model = build()
    images, mask, ids = draw()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(images, mask, ids), model(images, mask, ids)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.token_accuracy, theirs.token_accuracy)


@pytest.mark.untyped
@pytest.mark.parametrize("features", [None, torch.zeros(3, 24, 5), torch.zeros(3, 10, 4)])
def test_features_that_do_not_fit_are_repeated_in_the_error(features):
    images, mask, _ = draw()
    got = None if features is None else tuple(features.shape)
    with pytest.raises(ValueError, match=rf"\(3, 10, 5\); got {re.escape(str(got))}"):
        build(target="features", feature_dim=5)(images, mask, features=features)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, r"each of the 24 patches of 3 images, \(3, 24\); got None"),
        ({"ids": torch.zeros(3, 20, dtype=torch.int64)}, r"got \(3, 20\)"),
        ({"ids": torch.full((3, 24), 16)}, r"\[0, 16\); got 16 to 16"),
        ({"images": torch.zeros(3, 3, 16, 20)}, r"size \(16, 24\); got \(3, 3, 16, 20\)"),
        ({"mask": masking.uniform(masking.key(range(3), seed=0), (4, 4), 0.5)}, r"\(4, 4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_repeated_in_the_error(change, message):
    images, mask, ids = draw()
    given_ = {"images": images, "mask": mask, "ids": ids} | change
    with pytest.raises(ValueError, match=message):
        build()(given_["images"], given_["mask"], given_["ids"])


def test_uneven_counts_name_the_first_odd_sample():
    is_masked = masking.compat.beit(masking.key(range(50), seed=0), (14, 14), num_masked=75)
    with pytest.raises(ValueError, match=r"same number of tokens, 7\d of 196, but sample \d+"):
        Mask.from_bool(is_masked)


@pytest.mark.untyped
def test_an_image_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"image size \(30, 24\) is not divisible .*\(4, 4\)"):
        build(image_size=(30, 24))


# The recipe


def options(pictures: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", str(pictures), "--out", str(out), "--batch-size", "8", "--epochs", "1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained_tokenizer(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    assert tokenizer.main(options(pictures, out, "--vocabulary-size", "32")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["codes_used"] <= 1
    assert 1 <= summary["perplexity"] <= 32
    assert (out / "reconstructions.png").exists()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0].keys() >= {"loss", "codes_used", "perplexity", "divergence", "temperature"}
    return out / "tokenizer.safetensors"


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--target", "rgb"],
        *(
            pytest.param(more, marks=pytest.mark.full)
            for more in (["--no-alignment"], ["--no-decoder"], ["--sampler", "uniform"])
        ),
    ],
    ids=lambda more: " ".join(more) or "default",
)
def test_a_run_writes_numbers_and_pictures(more, pictures, tmp_path, capfd):
    out = tmp_path / "run"
    assert run(RECIPE, "", options(pictures, out, *more)) == 0
    written = {path.name for path in out.iterdir()}
    assert written >= {"decode_full.png", "reconstructions.png", "encoder.safetensors"}
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row.keys() >= {"main_loss", "alignment_loss", "latent_spread"}
    names = {"uniform", "unigram"} if "rgb" not in more else {"zero", "nearest"}
    assert row["baselines"].keys() >= names
    file = load_encoder(out / "encoder.safetensors", ViTShape())
    assert (file.shape.qkv_bias, file.shape.layer_scale) == ("qv", 1.0)


@pytest.fixture(scope="module")
def other_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "run"
    assert run(RECIPE, "", options(pictures, out, "--no-alignment")) == 0
    return out


def test_a_run_predicts_the_features_of_a_given_encoder(pictures, other_run, tmp_path):
    out = tmp_path / "run"
    teacher = str(other_run / "encoder.safetensors")
    more = ["--target", "features", "--teacher", teacher, "--no-alignment", "--no-decoder"]
    assert run(RECIPE, "", options(pictures, out, *more)) == 0
    assert {path.name for path in out.iterdir()} >= {"decode_full.png", "reconstructions.png"}
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["baselines"].keys() == {"mean"}
    config = dataclasses.replace(
        RECIPE.presets["tiny"].model, target="features", teacher=teacher, no_alignment=True
    )
    model, images = build_with_target(config), torch.randn(2, 3, 32, 32)
    own = build_with_target(dataclasses.replace(config, target="tokens", teacher=None)).encoder
    own.load_state_dict(load_file(teacher))
    mask = masking.uniform(masking.key(range(2), seed=0), (8, 8), 0.5)
    expected = own(images)[:, 1:].gather(1, mask.masked_ids.unsqueeze(2).expand(-1, -1, 96))
    torch.testing.assert_close(model.target(images, mask), expected)
    assert not any(weight.requires_grad for weight in model.target.teacher.parameters())
    mean = float(RECIPE.baselines(model, images, mask)["mean"])
    assert 0 <= mean < 1


def test_a_teacher_that_does_not_fit_gets_one_clear_line(other_run, tmp_path):
    teacher = str(other_run / "encoder.safetensors")
    shapeless = tmp_path / "encoder.safetensors"
    shapeless.write_bytes((other_run / "encoder.safetensors").read_bytes())
    features = ["--target", "features"]
    for more, says in (
        (features, "--target features needs --teacher FILE"),
        ([*features, "--teacher", "nowhere"], "--teacher nowhere is not a file"),
        ([*features, "--teacher", str(shapeless)], f"--teacher {shapeless}"),
        (
            [*features, "--teacher", teacher, "--preset", "vit_base"],
            f"--teacher {teacher} takes patches of (4, 4) pixels and 3 channels where this model "
            "takes (16, 16) and 3",
        ),
        (["--image-size", "30"], "image size (30, 30) is not divisible"),
    ):
        with pytest.raises(UserError) as caught:
            check_command(RECIPE, *more)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_takes_a_trained_tokenizer(pictures, trained_tokenizer, tmp_path):
    out = tmp_path / "run"
    more = ["--tokenizer", str(trained_tokenizer)]
    assert run(RECIPE, "", options(pictures, out, *more)) == 0
    assert (out / "decode_full.png").exists()
    model = RECIPE.presets["tiny"].model
    vae = build_with_target(
        dataclasses.replace(model, tokenizer=str(trained_tokenizer))
    ).target.tokenizer
    assert vae.vocabulary_size == 32
    assert vae.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8)


def test_a_run_is_not_finished_for_another_tokenizer_under_the_same_name(
    pictures, trained_tokenizer, tmp_path, capfd
):
    file, out = tmp_path / "tokenizer.safetensors", tmp_path / "run"
    shutil.copyfile(trained_tokenizer, file)
    more = ["--tokenizer", str(file)]
    assert run(RECIPE, "", options(pictures, out, *more)) == 0
    weights = load_file(file)
    save_file({name: 2 * weight for name, weight in weights.items()}, file)
    capfd.readouterr()
    assert run(RECIPE, "", options(pictures, out, *more)) == 2
    assert "other values of contents.tokenizer: choose another --out" in capfd.readouterr().err


def test_openais_names_are_read_and_make_the_same_tokens(tmp_path):
    vae = DiscreteVAE(dim=8, groups=2, depth=1, vocabulary_size=16, has_decoder=False)
    save_file(dict(to_official("dalle", vae.state_dict())), tmp_path / "encoder.safetensors")
    model = dataclasses.replace(
        RECIPE.presets["tiny"].model, tokenizer=str(tmp_path / "encoder.safetensors")
    )
    pretrain, images = build_with_target(model), torch.randn(2, 3, 32, 32)
    # A code stands for 2 pixels, a patch for 4: the image is read at half its size.
    halved = nn.functional.interpolate(
        to_pixels(images), scale_factor=0.5, mode="bicubic", antialias=True
    ).clamp(0, 1)
    assert torch.equal(pretrain.target.encode(images), vae.encode(halved).flatten(1))


def test_pixels_and_model_inputs_are_each_others_inverse():
    pixels = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(to_pixels(to_inputs(pixels)), pixels)
    gray = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(to_pixels(to_inputs(gray)), gray)


def test_the_trivial_predictors_know_what_they_say_they_know():
    torch.manual_seed(0)
    model = build_with_target(RECIPE.presets["tiny"].model)
    images = torch.randn(64, 3, 32, 32)
    RECIPE.fit(model, images)
    counts = torch.bincount(model.target.encode(images).flatten(), minlength=128)
    assert torch.equal(model.target.frequencies, (counts + 1) / (counts + 1).sum())
    mask = masking.uniform(masking.key(range(64), seed=0), (8, 8), 0.5)
    scores = RECIPE.baselines(model, images, mask)
    assert float(scores["uniform"]) == pytest.approx(np.log(128))
    assert scores["unigram"] < scores["uniform"]
    share = model(images, mask).top_token_share
    ids = model.target.encode(images).gather(1, mask.masked_ids)
    assert float(share) == pytest.approx(float((ids == counts.argmax()).float().mean()))


def test_every_preset_builds_on_the_meta_device():
    for name, preset in RECIPE.presets.items():
        config = dataclasses.replace(preset.model, tokenizer="patches")
        with torch.device("meta"):
            model = build_with_target(config)
        assert isinstance(model.project, nn.Sequential) == (name == "vit_large_as_shipped")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tokenizer", "nowhere.pt"], "--tokenizer nowhere.pt is not a file"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0"),
        (["--preset", "vit_base"], "--tokenizer dalle_encoder.pt is not a file"),
        (["--target", "words"], "words"),
    ],
)
def test_a_mistake_gets_one_clear_line(more, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_command(RECIPE, *more)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_gets_one_clear_line(tmp_path):
    files = {
        "stride 8": DiscreteVAE(dim=4, groups=4, depth=1, vocabulary_size=8, stem_dim=4),
        "gray": DiscreteVAE(in_channels=1, dim=4, groups=3, depth=1, vocabulary_size=8, stem_dim=4),
        "no vae": nn.Linear(2, 2),
    }
    says = {
        "stride 8": "stands for 8 x 8 pixels, and a patch size of (4, 4) is not a multiple",
        "gray": "takes images of 1 channels, not 3",
        "no vae": "holds no discrete VAE",
    }
    for name, module in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(module.state_dict(), path)
        with pytest.raises(UserError) as caught:
            check_command(RECIPE, "--tokenizer", str(path))
        assert says[name] in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a multiple"):
        ImageTokenizer(files["stride 8"], (16, 16), (4, 4))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--image-size", "30"], "--image-size 30 is not a multiple of the 4 pixels"),
        (["--batch-size", "1000"], "--batch-size 1000"),
    ],
)
def test_a_tokenizers_mistakes_get_one_clear_line(more, says, pictures, tmp_path, capfd):
    assert tokenizer.main(options(pictures, tmp_path / "run", *more)) == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1
