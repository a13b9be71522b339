"""Tools that take models and batches: what works with masks, and what the guide says does not."""

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import accelerate.utils
import peft
import pytest
import torch
import torchao.quantization
import torchinfo
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mimkit import masking
from mimkit.masking import Mask
from recipes.mae import MAE, MAEConfig
from tests.peers.test_export import ENCODERS, build, inputs
from tests.peers.two_processes import run_in_two_processes

CONFIG: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 1, "heads": 2}


def make_model() -> MAE:
    torch.manual_seed(0)
    return MAE(MAEConfig(**CONFIG, decoder_dim=16, decoder_depth=1, decoder_heads=2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention, one by one
@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_of_single_samples_by_vmap(name: str) -> None:
    encoder = build(name)
    weights = {key: weight.detach() for key, weight in encoder.named_parameters()}
    images, _ = inputs(encoder, 3, 0)

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        tokens: Tensor = functional_call(encoder, weights, (image[None],))
        return tokens.square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, images)
    expected = grad(loss)(weights, images[1])
    for key, one in expected.items():
        torch.testing.assert_close(found[key][1], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_lora_adapts_all_linear_layers(name: str) -> None:
    encoder = build(name)
    images, mask = inputs(encoder, 3, 0)
    expected = encoder(images, mask)
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(target_modules="all-linear"))
    torch.testing.assert_close(adapted(images, mask), expected)  # LoRA starts at zero
    adapted(images, mask).sum().backward()
    trained = [name for name, weight in adapted.named_parameters() if weight.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


def test_lora_on_a_patch_embedding_is_refused_by_peft() -> None:
    with pytest.raises(ValueError, match=r"PatchProjection\(\) is not supported"):
        peft.get_peft_model(build("vit"), peft.LoraConfig(target_modules=["patch_embed.proj"]))


def test_accelerate_moves_masks_and_gathers_their_booleans() -> None:
    images, mask = inputs(build("vit"), 3, 0)
    batch = accelerate.utils.send_to_device((images, mask), "cpu")
    assert batch[1].equal(mask)
    assert accelerate.utils.find_batch_size((images, mask)) == 3
    joined = accelerate.utils.concatenate([mask.is_masked, mask.is_masked])
    assert Mask.from_bool(joined).equal(Mask.cat([mask, mask]))
    with pytest.raises(TypeError):  # as the guide says
        accelerate.utils.find_batch_size(mask)
    with pytest.raises(TypeError):
        accelerate.utils.concatenate([mask, mask])


class DrawsMask(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        key = masking.key(range(len(images)), seed=0)
        encoded: Tensor = self.encoder(images, masking.uniform(key, self.encoder.grid, 0.5))
        return encoded


def test_torchinfo_counts_an_encoder_and_one_that_draws_its_mask() -> None:
    encoder = build("vit")
    images, mask = inputs(encoder, 3, 0)
    count = sum(weight.numel() for weight in encoder.parameters())
    for model in (encoder, DrawsMask(encoder)):
        assert torchinfo.summary(model, input_data=images, verbose=0).total_params == count
    with pytest.raises(TypeError):  # as the guide says
        torchinfo.summary(encoder, input_data=[images, mask], verbose=0)


def test_copies_pickles_and_files_keep_the_loss() -> None:
    model = make_model()
    images, mask = inputs(model.encoder, 3, 0)
    expected = model(images, mask).loss
    other = make_model()
    other.load_state_dict(load(save(model.state_dict())))
    copied = pickle.loads(pickle.dumps((model, mask)))
    assert torch.equal(copied[0](images, copied[1]).loss, expected)
    assert torch.equal(copy.deepcopy(model)(images, copy.deepcopy(mask)).loss, expected)
    assert torch.equal(other(images, mask).loss, expected)


def test_outputs_are_indexed_as_those_of_transformers() -> None:
    model = make_model()
    output = model(*inputs(model.encoder, 3, 0))
    assert output["loss"] is output[0] is output.loss
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).loss, output.loss)


def test_averages_of_weights_and_muon_train() -> None:
    model = make_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    images, mask = inputs(model.encoder, 8, 0)
    inside = [w for n, w in model.named_parameters() if w.ndim == 2 and "blocks" in n]
    optimizer = torch.optim.Muon(inside, lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(images, mask).loss
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert float(average(images, mask).loss) < losses[0]


def test_the_whole_model_compiles_into_one_graph() -> None:
    model = make_model()
    images, mask = inputs(model.encoder, 3, 0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, mask).loss, model(images, mask).loss)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_weights_quantised_to_eight_bits_by_torchao_give_close_tokens(name: str) -> None:
    encoder = build(name)
    images, mask = inputs(encoder, 3, 0)
    expected = encoder(images, mask), encoder(images)
    torchao.quantization.quantize_(encoder, torchao.quantization.Int8WeightOnlyConfig())
    kinds = {type(weight.data).__name__ for weight in encoder.parameters()}
    assert "Int8Tensor" in kinds
    for found, exact in zip((encoder(images, mask), encoder(images)), expected, strict=True):
        difference = (found - exact).abs().max() / exact.abs().max()
        assert 0 < difference < 0.02  # eight bits, of which the largest weight of a row has all


def test_a_step_in_two_processes_under_fsdp2_is_the_plain_step_of_the_whole_batch() -> None:
    printed = run_in_two_processes(Path(__file__).with_name("sharded_step.py"))
    for name in ENCODERS:
        line = rf"(?<!conv){name}: (\d+) of \d+ tensors moved, rank [01] the same"
        lines = re.findall(line, printed)
        assert len(lines) == 2
        assert int(lines[0]) > 10
