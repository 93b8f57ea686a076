"""The paper's dVAE is the published one: sizes, names, what it computes, in 16 bits too; and any smaller size trains."""

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from distopt.integrations.dalle.architectures import build, from_table, to_table
from distopt.integrations.dalle.dvae import DVAESettings
from distopt.integrations.dalle.likelihood import logit_laplace
from distopt.integrations.dalle.paper_dvae import Convolution, PaperDVAE, PaperDVAESettings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distopt.errors import SettingError
from distopt.numerics.emulation import emulated_16bit

TINY = {"size": 16, "codes": 24, "n_hid": 8, "n_init": 6}


def make(seed: int = 0, **fields: object) -> PaperDVAE:
    torch.manual_seed(seed)
    return PaperDVAE(PaperDVAESettings(**{**TINY, **fields}))


def pictures(n: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def block(weights: Mapping[str, Tensor], prefix: str, x: Tensor, layers: int) -> Tensor:
    """A residual block over weights in the published layout; the sizes of the kernels are those of the weights."""

    def convolve(name: str, x: Tensor) -> Tensor:
        w = weights[f"{prefix}.{name}.w"]
        return F.conv2d(x, w, weights[f"{prefix}.{name}.b"], padding=(w.shape[-1] - 1) // 2)

    y = x
    for i in range(1, 5):
        y = convolve(f"res_path.conv_{i}", y.relu())
    short = convolve("id_path", x) if f"{prefix}.id_path.w" in weights else x
    return short + y / layers**2


def reference_encoder(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = F.conv2d(0.8 * x + 0.1, weights["blocks.input.w"], weights["blocks.input.b"], padding=3)
    for group in range(1, 5):
        for i in (1, 2):
            x = block(weights, f"blocks.group_{group}.block_{i}", x, 8)
        if group < 4:
            x = F.max_pool2d(x, 2, 2)
    return F.conv2d(x.relu(), weights["blocks.output.conv.w"], weights["blocks.output.conv.b"])


def reference_decoder(weights: Mapping[str, Tensor], z: Tensor) -> Tensor:
    x = F.conv2d(z, weights["blocks.input.w"], weights["blocks.input.b"])
    for group in range(1, 5):
        for i in (1, 2):
            x = block(weights, f"blocks.group_{group}.block_{i}", x, 8)
        if group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(x.relu(), weights["blocks.output.conv.w"], weights["blocks.output.conv.b"])


def loud(dvae: PaperDVAE) -> PaperDVAE:
    """With residual paths and biases that are large enough to be seen."""
    for name, p in dvae.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(p, std=0.3)
        elif "res_path" in name:
            p.data.mul_(2)
    return dvae


def test_at_full_size_it_has_the_parameters_of_the_published_networks():
    with torch.device("meta"):
        dvae = PaperDVAE(PaperDVAESettings())
    sizes = [sum(p.numel() for p in part.parameters()) for part in (dvae.encoder, dvae.decoder)]
    assert sizes == [53_786_240, 43_829_766]
    assert [round(size / 1e6, 2) for size in sizes] == [53.79, 43.83]
    assert (dvae.settings.grid, dvae.settings.tokens, dvae.settings.patch) == (32, 1024, 8)
    shapes = {name: tuple(p.shape) for name, p in dvae.state_dict().items()}
    # As listed by a public export of the published files.
    assert shapes["encoder.blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["encoder.blocks.group_1.block_1.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert shapes["encoder.blocks.group_1.block_1.res_path.conv_2.b"] == (64,)
    assert shapes["decoder.blocks.group_1.block_1.id_path.w"] == (2048, 128, 1, 1)
    assert shapes["decoder.blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
    assert shapes["decoder.blocks.group_1.block_1.res_path.conv_2.w"] == (512, 512, 3, 3)
    assert shapes["decoder.blocks.input.w"] == (128, 8192, 1, 1)
    assert shapes["encoder.blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert shapes["decoder.blocks.output.conv.w"] == (6, 256, 1, 1)
    assert len(dvae.units()) == 16


@pytest.mark.parametrize("size", [16, 24])
def test_it_computes_what_the_layout_says(size: int):
    dvae = loud(make(size=size))
    x = pictures(2, size)
    logits = dvae.encode(x)
    expected = reference_encoder(dvae.encoder.state_dict(), x)
    assert logits.shape == (2, 24, size // 8, size // 8)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    z = logits.softmax(1)
    outputs = dvae.render(z)
    assert outputs.shape == (2, 6, size, size)
    torch.testing.assert_close(outputs, reference_decoder(dvae.decoder.state_dict(), z), rtol=1e-5, atol=1e-5)


@given(
    groups=st.integers(1, 4),
    blocks=st.integers(1, 2),
    n_hid=st.integers(1, 3),
    n_init=st.integers(1, 9),
    grid=st.integers(1, 3),
    codes=st.integers(2, 9),
    likelihood=st.sampled_from(["mse", "logit_laplace"]),
)
@settings(max_examples=15, deadline=None)
def test_any_shape_gives_a_grid_of_tokens_and_pictures_back(groups, blocks, n_hid, n_init, grid, codes, likelihood):
    shape = {"groups": groups, "blocks": blocks, "n_hid": 4 * n_hid, "n_init": n_init, "codes": codes}
    size = grid * 2 ** (groups - 1)
    dvae = make(size=size, likelihood=likelihood, **shape)
    tokens = dvae.tokenize(pictures(2, size))
    assert tokens.shape == (2, grid**2)
    back = dvae.decode(tokens)
    assert back.shape == (2, 3, size, size)
    assert 0 <= back.min() <= back.max() <= 1
    assert {unit.post_gain for unit in dvae.units()} == {1 / (groups * blocks) ** 2}
    assert len(dvae.units()) == 2 * groups * blocks
    assert from_table(to_table(dvae.settings)) == dvae.settings
    assert type(build(dvae.settings)) is PaperDVAE


def test_weights_start_from_the_inverse_root_of_the_fan_in_and_biases_at_zero():
    layer = Convolution(64, 200, 3)
    assert layer.w.std().item() == pytest.approx(1 / 24, rel=0.02)
    assert layer.w.mean().item() == pytest.approx(0, abs=1e-3)
    assert layer.b.abs().max() == 0


@given(seed=st.integers(0, 1000), n=st.integers(1, 3), copies=st.integers(2, 3), tau=st.floats(0.1, 1.0))
@settings(max_examples=15, deadline=None)
def test_repeating_a_batch_changes_nothing(seed: int, n: int, copies: int, tau: float):
    dvae, x = loud(make(seed)).double(), pictures(n, seed=seed).double()
    noise = torch.randn(n, 24, 2, 2, dtype=torch.float64)
    weights = {"tau": tau, "beta": 6.6, "usage": 0.1, "edges": 1.0}
    once = dvae(x, noise=noise, **weights)
    again = dvae(x.repeat(copies, 1, 1, 1), noise=noise.repeat(copies, 1, 1, 1), **weights)
    for a, b in zip(vars(once).values(), vars(again).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_at_256_pixels_the_weight_of_the_mean_divergence_is_beta_over_192():
    dvae = loud(make(size=256, n_hid=4, n_init=4, codes=8))
    x = pictures(2, 256)
    loss = dvae.loss(x, tau=0.5, beta=6.6)
    torch.testing.assert_close(loss.total, loss.reconstruction + 6.6 / 192 * loss.kl)
    # The same from sums: 256 x 256 x 3 sub-pixels, 32 x 32 cells.
    q = dvae.encode(x).softmax(1)
    divergence = (q * (q * 8).log()).sum() / len(x)
    torch.testing.assert_close(6.6 * divergence / (256 * 256 * 3), 6.6 / 192 * loss.kl, rtol=1e-4, atol=1e-6)


def test_the_reconstruction_is_the_density_of_the_squashed_laplace_without_a_floor():
    dvae, x = loud(make()).double(), pictures(2).double()
    noise = torch.zeros(2, 24, 2, 2, dtype=torch.float64)
    means, log_b = dvae.render((dvae.encode(x) / 0.3).softmax(1)).chunk(2, 1)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Laplace(means, log_b.exp()), [torch.distributions.SigmoidTransform()]
    )
    expected = -squashed.log_prob(0.8 * x + 0.1).mean()
    torch.testing.assert_close(dvae.loss(x, tau=0.3, noise=noise).reconstruction, expected)
    floored = PaperDVAE(PaperDVAESettings(**TINY, log_scale_floor=1.0)).double()
    floored.load_state_dict(dvae.state_dict())
    told = floored.loss(x, tau=0.3, noise=noise).reconstruction
    torch.testing.assert_close(told, logit_laplace(x, means, log_b.clamp_min(1.0)).mean())
    assert abs(told - expected) > 0.01
    decoded = dvae.decode(dvae.tokenize(x))
    z = F.one_hot(dvae.encode(x).argmax(1), 24).movedim(-1, 1).double()
    torch.testing.assert_close(decoded, ((dvae.render(z)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_all_but_the_two_layers_at_the_codes_are_rounded(dtype: torch.dtype):
    dvae, x = make(), pictures(4)
    seen: dict[str, torch.dtype] = {}
    for name, module in dvae.named_modules():
        if isinstance(module, Convolution):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    noise = torch.zeros(4, 24, 2, 2)
    exact = dvae.loss(x, tau=0.5, beta=1.0, noise=noise)
    exact.total.backward()
    gradients = torch.cat([p.grad.flatten() for p in dvae.parameters()])
    dvae.zero_grad()
    with emulated_16bit():
        rough = dvae.loss(x, tau=0.5, beta=1.0, noise=noise, dtype=dtype)
        (1024 * rough.total).backward()
    wide = {name for name, kind in seen.items() if kind == torch.float32}
    assert wide == {"encoder.blocks.output.conv", "decoder.blocks.input"}
    assert set(seen.values()) == {dtype, torch.float32}
    assert rough.total.dtype == torch.float32
    assert rough.total.item() == pytest.approx(exact.total.item(), rel=0.02)
    rounded = torch.cat([p.grad.flatten() for p in dvae.parameters()])
    assert F.cosine_similarity(rounded, gradients, 0) > 0.99


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 12),
        ("size", 0),
        ("codes", 1),
        ("n_hid", 6),
        ("n_init", 0),
        ("groups", 0),
        ("blocks", 1.5),
        ("likelihood", "l1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object):
    with pytest.raises(SettingError, match=f"PaperDVAESettings.{field} is "):
        PaperDVAESettings(**{**TINY, field: value})


def test_the_divergence_is_at_most_the_logarithm_of_the_codes():
    dvae, x = make(), pictures(2)
    for bias, expected in ((0.0, 0.0), (1e4, math.log(24))):
        last = dvae.encoder.blocks[-1].conv
        torch.nn.init.zeros_(last.w)
        last.b.data = torch.tensor([bias, *[0.0] * 23])
        assert dvae.loss(x, tau=1.0).kl.item() == pytest.approx(expected, abs=1e-5)


def test_a_saved_table_without_a_name_is_of_the_small_architecture():
    table = to_table(DVAESettings(codes=7))
    assert table.pop("architecture") == "small"
    assert from_table(table) == DVAESettings(codes=7)
