"""CAE's regressor, decoder and token head, and the patch tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mimkit import masking
from mimkit.nn import CAEDecoder, ContextRegressor, PatchTokenizer, TokenHead
from tests.strategies import generators, masks

WIDTH = 12


def randomized(module, generator):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return module.double()


def draw_tokens(generator, batch, *lengths):
    return [torch.randn(batch, n, WIDTH, generator=generator).double() for n in lengths]


@given(generators(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 5))
def test_the_regressor_equals_the_formula_of_the_paper(generator, batch, masked, visible):
    regressor = randomized(ContextRegressor(dim=WIDTH, depth=2, heads=3), generator)
    q, latents, p_q, p_v = draw_tokens(generator, batch, masked, visible, masked, visible)
    expected = q
    for block in regressor.blocks:
        kv = torch.cat([latents, expected], 1)
        attention = block.cross_attn
        query = attention.q(block.norm_q(expected + p_q))
        key = attention.k(block.norm_k(kv + torch.cat([p_v, p_q], 1)))
        value = attention.v(block.norm_v(kv))
        query, key, value = (t.unflatten(2, (3, 4)).transpose(1, 2) for t in (query, key, value))
        weights = (query @ key.transpose(2, 3) / 2).softmax(-1)
        attended = attention.proj((weights @ value).transpose(1, 2).flatten(2))
        expected = block.norm2(expected + block.gamma_1 * attended)
        expected = expected + block.gamma_2 * block.mlp(expected)
    torch.testing.assert_close(regressor(q, latents, p_q, p_v), regressor.norm(expected))


@given(masks(), st.integers(0, 3), generators())
def test_from_mask_token_equals_forward_with_a_mask_token_per_query(mask, depth, generator):
    regressor = randomized(ContextRegressor(dim=WIDTH, depth=depth, heads=3), generator)
    token, positions = draw_tokens(generator, 1, 1, mask.num_tokens)
    token, positions = token[0, 0], positions[0]
    [visible] = draw_tokens(generator, mask.batch_size, mask.num_visible)
    leaves = [
        leaf.requires_grad_() for leaf in (token, positions, visible, *regressor.parameters())
    ]
    queries = token.expand(mask.batch_size, mask.num_masked, -1)
    expected = regressor(queries, visible, positions[mask.masked_ids], positions[mask.visible_ids])
    predicted = regressor.from_mask_token(token, visible, positions, mask)
    torch.testing.assert_close(predicted, expected)
    upstream = torch.randn(expected.shape, generator=generator).double()
    ours, theirs = (
        torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)
        for out in (predicted, expected)
    )
    torch.testing.assert_close(ours, theirs)


@given(generators(), st.integers(1, 4), st.integers(1, 4), st.data())
def test_the_regressor_is_equivariant_to_token_order(generator, masked, visible, data):
    regressor = randomized(ContextRegressor(dim=WIDTH, depth=2, heads=3), generator)
    q, latents, p_q, p_v = draw_tokens(generator, 2, masked, visible, masked, visible)
    rows = list(data.draw(st.permutations(range(masked))))
    others = list(data.draw(st.permutations(range(visible))))
    out = regressor(q, latents, p_q, p_v)
    moved = regressor(q[:, rows], latents[:, others], p_q[:, rows], p_v[:, others])
    torch.testing.assert_close(moved, out[:, rows])


@given(generators())
def test_samples_do_not_affect_each_other(generator):
    regressor = randomized(ContextRegressor(dim=WIDTH, depth=1, heads=3), generator)
    q, latents, p_q, p_v = draw_tokens(generator, 3, 2, 4, 2, 4)
    alone = regressor(q[1:2], latents[1:2], p_q[1:2], p_v[1:2])
    torch.testing.assert_close(regressor(q, latents, p_q, p_v)[1:2], alone)


def test_values_have_no_positions():
    """With a single key its weight is 1, so positions could reach the output only by the value."""
    regressor = ContextRegressor(dim=WIDTH, depth=1, heads=3)
    q, p = torch.randn(2, 1, WIDTH), torch.randn(2, 1, WIDTH)
    none = torch.zeros(2, 0, WIDTH)  # no visible tokens
    torch.testing.assert_close(regressor(q, none, p, none), regressor(q, none, 3 * p, none))


def test_a_decoder_of_depth_zero_is_its_norm():
    decoder, latent = CAEDecoder(dim=WIDTH, depth=0, heads=3), torch.randn(2, 3, WIDTH)
    position = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(decoder(latent, position), decoder.norm(latent + position))


@pytest.mark.full
@pytest.mark.untyped
def test_the_regressor_compiles_into_one_graph():
    regressor = ContextRegressor(dim=WIDTH, depth=1, heads=3)
    q, latents, p_q, p_v = (torch.randn(2, n, WIDTH) for n in (3, 4, 3, 4))
    compiled = torch.compile(regressor, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, latents, p_q, p_v), regressor(q, latents, p_q, p_v))
    mask = masking.uniform(masking.key([0, 1], seed=0), (7,), num_masked=3)
    inputs = q[0, 0], latents, torch.randn(7, WIDTH), mask
    from_token = torch.compile(regressor.from_mask_token, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(from_token(*inputs), regressor.from_mask_token(*inputs))


@given(generators(), st.integers(1, 3), st.integers(1, 5))
def test_the_token_heads_loss_equals_cross_entropy_of_its_logits(generator, batch, tokens):
    head = TokenHead(dim=WIDTH, vocabulary_size=7)
    x = torch.randn(batch, tokens, WIDTH, generator=generator, requires_grad=True)
    target = torch.randint(7, (batch, tokens), generator=generator)
    logits = head(x)
    loss, accuracy = head(x, target, return_accuracy=True)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected)
    assert torch.equal(loss, head(x, target))
    assert float(accuracy) == pytest.approx((logits.argmax(2) == target).float().mean().item())
    ours = torch.autograd.grad(loss, [x, head.weight, head.bias])
    theirs = torch.autograd.grad(expected, [x, head.weight, head.bias])
    torch.testing.assert_close(ours, theirs)


@given(generators(), st.floats(0.1, 10), st.floats(-5, 5))
def test_codes_do_not_depend_on_contrast_or_brightness(generator, contrast, brightness):
    images = torch.randn(3, 2, 4, 6, generator=generator)
    tokenizer = PatchTokenizer(patch_size=(2, 3), in_channels=2, vocabulary_size=4).fit(images)
    ids = tokenizer.encode(images)
    assert ids.shape == (3, 2, 2)
    assert torch.equal(tokenizer.encode(images * contrast + brightness), ids)


def test_after_k_means_each_center_is_the_mean_of_its_patches():
    images = torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    tokenizer = PatchTokenizer(patch_size=(2, 2), in_channels=1, vocabulary_size=5)
    before = tokenizer.fit(images, iterations=0).centers.clone()
    ids = tokenizer.fit(images, iterations=60).encode(images).flatten()
    patches = images.flatten(1)
    patches = (patches - patches.mean(1, keepdim=True)) / patches.std(1, keepdim=True)
    means = torch.stack([patches[ids == code].mean(0) for code in range(5)])
    torch.testing.assert_close(tokenizer.centers, means, rtol=1e-4, atol=1e-5)
    assert torch.cdist(patches, means).min(1).values.square().mean() < (
        torch.cdist(patches, before).min(1).values.square().mean()
    )


@pytest.mark.untyped
def test_a_ragged_mask_is_refused():
    regressor = ContextRegressor(dim=WIDTH, depth=1, heads=3)
    ragged = masking.ragged(masking.uniform, masking.key([0], seed=0), [(2, 2)], 0.5)
    token, visible, positions = (torch.zeros(*shape, WIDTH) for shape in ((), (1, 2), (4,)))
    with pytest.raises(TypeError, match="RaggedMask"):
        regressor.from_mask_token(token, visible, positions, ragged)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ContextRegressor(dim=WIDTH, depth=1, heads=3)(
                *(torch.zeros(1, n, WIDTH) for n in (2, 3, 3, 3))
            ),
            r"query_positions .*\(1, 2, 12\); got \(1, 3, 12\)",
        ),
        (
            lambda: ContextRegressor(dim=WIDTH, depth=1, heads=3).from_mask_token(
                torch.zeros(WIDTH),
                torch.zeros(1, 3, WIDTH),
                torch.zeros(4, WIDTH),
                masking.uniform(masking.key([0], seed=0), (2, 2), 0.5),
            ),
            r"visible = 2, as mask; got \(1, 3, 12\)",
        ),
        (
            lambda: TokenHead(dim=4, vocabulary_size=7)(
                torch.zeros(1, 2, 4), torch.tensor([[0, 7]])
            ),
            r"\[0, 7\); got 0 to 7",
        ),
        (
            lambda: TokenHead(dim=4, vocabulary_size=7)(
                torch.zeros(1, 2, 4), torch.tensor([[-1, 3]])
            ),
            "got -1 to 3",
        ),
        (
            lambda: TokenHead(dim=4, vocabulary_size=7)(
                torch.zeros(1, 2, 4), torch.tensor([[1, 2, 3]])
            ),
            r"tokens = 2, as x \(1, 2, 4\); got \(1, 3\)",
        ),
        (
            lambda: PatchTokenizer(patch_size=(2, 2), in_channels=1, vocabulary_size=9).fit(
                torch.zeros(2, 1, 4, 4)
            ),
            "9 codes need at least 9 patches; got 8",
        ),
    ],
)
def test_what_does_not_fit_is_repeated_in_the_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
