"""ConvMAE and FastConvMAE against the numbers of the authors' own code."""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from mimkit import masking
from mimkit.interop import from_official, to_official
from mimkit.masking import Mask
from mimkit.patches import gather_visible, unpack_cells
from recipes.convmae import ConvMAE, ConvMAEConfig, ConvMAEOutput
from tests.golden_files import Golden, golden

FILES = ["convmae_A", "convmae_A224", "fastconvmae_A"]


def config(vectors: Golden, **changes: object) -> ConvMAEConfig:
    theirs = vectors.config
    ours = {
        "image_size": theirs["img_size"][0],
        "patch_sizes": tuple(theirs["patch_size"]),
        "dim": tuple(theirs["embed_dim"]),
        "depth": tuple(theirs["depth"]),
        "heads": theirs["num_heads"],
        "mlp_ratio": tuple(map(float, theirs["mlp_ratio"])),
        "decoder_dim": theirs["decoder_embed_dim"],
        "decoder_depth": theirs["decoder_depth"],
        "decoder_heads": theirs["decoder_num_heads"],
        "normalize_pixels": theirs["norm_pix_loss"],
    }
    return ConvMAEConfig(**(ours | changes))


class Case:
    """One golden file, and this model on it."""

    def __init__(self, name: str) -> None:
        self.vectors = golden(name)
        self.method = self.vectors.config["method"]
        self.images = self.vectors.tensor("in/imgs")
        order = self.vectors.tensor("in/noise").argsort(dim=1)
        self.keep = masking.num_masked(
            order.shape[1], 1 - self.vectors.config["mask_ratio"], rounding="nearest"
        )
        side = self.vectors.config["img_size"][0] // 16
        parts = order.shape[1] // self.keep if self.method == "fastconvmae" else 1
        self.masks = [
            Mask.from_visible_ids(order[:, part * self.keep : (part + 1) * self.keep], (side, side))
            for part in range(parts)
        ]
        self.mask = Mask.cat(self.masks)
        self.given = self.masks if self.method == "fastconvmae" else self.mask
        self.model = self.load(self.vectors.tensors("param/"))
        self.seen: dict[str, Tensor] = {}
        watch(self.model, self.seen)
        self.output: ConvMAEOutput = self.model(self.images, self.given)
        self.output.loss.backward()

    def load(self, parameters: dict[str, Tensor], **changes: object) -> ConvMAE:
        model = ConvMAE(config(self.vectors, **changes))
        converted = from_official(self.method, parameters)
        assert converted.dropped == ()
        model.load_state_dict(converted)
        return model

    def at_visible(self, feature_map: Tensor) -> Tensor:
        """Zero the hidden positions of the authors' map, one copy for each mask."""
        feature_map = feature_map.repeat(len(self.masks), 1, 1, 1)
        factor = feature_map.shape[-1] // self.mask.grid[-1]
        return feature_map.masked_fill(self.mask.refine(factor).is_masked.unsqueeze(1), 0)

    def in_order(self, tokens: Tensor) -> Tensor:
        """Bring the authors' visible tokens from the order of noise to that of position."""
        name = "out/ids_keep4" if self.method == "fastconvmae" else "out/ids_keep"
        order = self.vectors.tensor(name).flatten(0, -2).argsort(dim=1)
        return tokens.gather(1, order.unsqueeze(2).expand_as(tokens))


def watch(model: nn.Module, seen: dict[str, Tensor]) -> None:
    """Note what the modules of the encoder return."""
    for name, module in model.named_modules():

        def note(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(note)


@pytest.fixture(scope="module", params=FILES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_the_masks_are_the_authors(case):
    assert torch.equal(case.mask.is_masked.flatten(1), case.vectors.tensor("out/mask").bool())


def test_the_loss_is_the_authors(case):
    assert case.output.loss.dtype == torch.float32
    torch.testing.assert_close(
        case.output.loss.detach(), case.vectors.tensor("out/loss"), rtol=2e-5, atol=0
    )


def test_the_loss_on_raw_pixels_is_the_authors(case):
    model = case.load(case.vectors.tensors("param/"), normalize_pixels=False)
    loss = model(case.images, case.given).loss.detach()
    torch.testing.assert_close(loss, case.vectors.tensor("out/loss_rawpix"), rtol=2e-5, atol=0)


STAGES = {
    "encoder.stages.0.embed": "patch_embed1",
    "encoder.stages.0.blocks.0.conv1": "cblock1_0_conv1",
    "encoder.stages.0.blocks.0.depthwise": "cblock1_0_dwconv_out",
    "encoder.stages.0.blocks.0.conv2": "cblock1_0_conv_branch",
    "encoder.stages.0": "stage1",
    "encoder.stages.1.embed": "patch_embed2",
    "encoder.stages.1": "stage2",
}


def test_the_stages_outputs_at_visible_positions_are_the_authors(case):
    compared = 0
    for ours, theirs in STAGES.items():
        if f"out/{theirs}" in case.vectors:
            feature_map = unpack_cells(case.seen[ours], case.mask)
            assert_near(feature_map, case.at_visible(case.vectors.tensor(f"out/{theirs}")))
            compared += 1
    assert compared >= 2


def test_the_tokens_of_the_last_stage_are_the_authors(case):
    vectors, seen, repeats = case.vectors, case.seen, len(case.masks)
    names = {
        "encoder.embed": "patch_embed3",
        "encoder.fusions.0": "stage1_fuse",
        "encoder.fusions.1": "stage2_fuse",
    }
    for ours, theirs in names.items():
        tokens = rearrange(vectors.tensor(f"out/{theirs}"), "b d h w -> b (h w) d")
        tokens = gather_visible(tokens.repeat(repeats, 1, 1), case.mask)
        assert_near(seen[ours].flatten(1, 2), tokens)
    tokens = gather_visible(vectors.tensor("out/patch_embed4").repeat(repeats, 1, 1), case.mask)
    assert_near(seen["encoder.embed_proj"], tokens)
    last = f"encoder.blocks.{vectors.config['depth'][-1] - 1}"
    assert_near(seen[last], case.in_order(vectors.tensor("out/stage3")))


def test_the_latents_and_predictions_are_the_authors(case):
    output, vectors = case.output, case.vectors
    assert_near(output.latent.detach(), case.in_order(vectors.tensor("out/latent")))
    if "out/pred" not in vectors:  # the large file holds some positions only
        chosen, theirs = vectors.tensor("out/pred_sub_idx"), vectors.tensor("out/pred_sub")
        whole = theirs.new_zeros(len(theirs), case.mask.num_tokens, theirs.shape[2])
        theirs = whole.index_copy(1, chosen, theirs)
        stored = torch.isin(case.mask.masked_ids, chosen)
    else:
        theirs, stored = vectors.tensor("out/pred"), torch.ones_like(case.mask.masked_ids).bool()
    ids = case.mask.masked_ids.unsqueeze(2).expand(-1, -1, theirs.shape[2])
    assert stored.any()
    assert_near(output.prediction[stored].detach(), theirs.gather(1, ids)[stored])


def gradients(case: Case) -> dict[str, Tensor]:
    named = case.model.named_parameters()
    return to_official(case.method, {n: p.grad for n, p in named if p.grad is not None})


def test_every_stored_gradient_is_the_authors(case):
    ours, theirs = gradients(case), case.vectors.tensors("grad/")
    assert theirs
    for name, expected in theirs.items():
        tolerance = 2e-4 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance, msg=name)


def test_every_gradient_norm_is_the_authors(case):
    theirs = case.vectors.tensors("gradnorm/")
    ours = {name: grad.double().norm() for name, grad in gradients(case).items()}
    assert ours.keys() == theirs.keys()
    for name, norm in theirs.items():
        torch.testing.assert_close(ours[name], norm, rtol=2e-4, atol=0, msg=name)


def test_small_variances_show_the_right_epsilons(case):
    vectors = case.vectors
    parameters = vectors.tensors("param/")
    for name in vectors.config["lowvar_params"]:
        parameters[name] = parameters[name] * vectors.config["lowvar_factor"]
    with torch.no_grad():
        output = case.load(parameters)(case.images, case.given)
    torch.testing.assert_close(output.loss, vectors.tensor("lowvar/loss"), rtol=2e-5, atol=0)
    latent = case.in_order(vectors.tensor("lowvar/latent"))
    torch.testing.assert_close(output.latent, latent, rtol=2e-5, atol=2e-5)


def test_every_norm_has_the_authors_epsilon(case):
    early = ("encoder.stages.", "encoder.embed.")
    for name, module in case.model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name.startswith(early) else 1e-6), name


def test_new_position_tables_are_the_authors_own(case):
    parameters = case.vectors.tensors("param/")
    fresh = to_official(case.method, ConvMAE(config(case.vectors)).state_dict())
    for name in ("pos_embed", "decoder_pos_embed"):
        parameters[name] = fresh[name]
    with torch.no_grad():
        output = case.load(parameters)(case.images, case.given)
    expected = case.vectors.tensor("pristine/loss")
    torch.testing.assert_close(output.loss, expected, rtol=2e-5, atol=0)


def test_the_state_dict_goes_out_as_it_came_in(case):
    parameters = case.vectors.tensors("param/")
    written = to_official(case.method, case.model.state_dict())
    assert written.dropped == ()
    assert written.keys() == parameters.keys()
    assert all(torch.equal(written[name], value) for name, value in parameters.items())


def test_a_list_of_masks_gives_the_mean_of_its_parts():
    case = Case("fastconvmae_A")
    with torch.no_grad():
        alone = [case.model(case.images, mask) for mask in case.masks]
    for name in ("prediction", "latent"):
        together = getattr(case.output, name).detach()
        torch.testing.assert_close(together, torch.cat([getattr(one, name) for one in alone]))
    mean = sum(one.loss for one in alone) / len(alone)
    torch.testing.assert_close(case.output.loss.detach(), mean)
