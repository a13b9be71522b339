"""mimkit's segmentation heads against transformers'."""

import pytest
import torch
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from mimkit.nn import FCNHead, UPerHead
from tests.nn import plain

DIMS = (4, 6, 8, 8)
MAPS = [torch.randn(2, dim, 24 // 2**level, 16 // 2**level) for level, dim in enumerate(DIMS)]


def config(**options: object) -> UperNetConfig:
    backbone = {"model_type": "resnet", "out_features": ["stage1"]}
    return UperNetConfig(backbone_config=backbone, hidden_size=10, num_labels=5, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool_scales", [(1, 2, 3, 6), (1,)])
def test_the_heads_logits_and_gradients_are_the_bits_of_transformers(training, pool_scales):
    theirs = UperNetHead(config(pool_scales=list(pool_scales)), in_channels=list(DIMS))
    plain.randomize(theirs)
    ours = UPerHead(in_dims=DIMS, num_classes=5, dim=10, pool_scales=pool_scales)
    ours.load_state_dict(theirs.state_dict())
    compare(ours.train(training), theirs.train(training), MAPS, MAPS)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("concat_input", [False, True])
@pytest.mark.parametrize("num_convs", [1, 2])
def test_the_auxiliary_head_is_that_of_transformers_bit_for_bit(training, concat_input, num_convs):
    options = {"auxiliary_channels": 7, "auxiliary_num_convs": num_convs}
    theirs = UperNetFCNHead(config(**options, auxiliary_concat_input=concat_input), list(DIMS))
    plain.randomize(theirs)
    ours = FCNHead(
        in_dim=DIMS[2], num_classes=5, dim=7, num_convs=num_convs, concat_input=concat_input
    )
    ours.load_state_dict(theirs.state_dict())
    compare(ours.train(training), theirs.train(training), MAPS[2], MAPS)


def compare(ours, theirs, our_input, their_input) -> None:
    results = [ours(our_input), theirs(their_input)]
    assert torch.equal(*results)
    for result in results:
        result.square().mean().backward()
    gradients = [{n: p.grad for n, p in head.named_parameters()} for head in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][n]) for n, gradient in gradients[0].items())
