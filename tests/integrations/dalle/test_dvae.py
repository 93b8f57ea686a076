"""The dVAE's loss is the paper's, whatever the batch; tokens see what the settings say; codes start spread out."""

import math

import pytest
import torch
import torch.nn.functional as F
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.likelihood import edge_weights, logit_laplace
from distopt.integrations.dalle.relaxed import gumbel
from distopt.integrations.tokenizers.kmeans import kmeans
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import SettingError

SMALL = {"size": 12, "grid": 3, "codes": 8, "width": 12, "neck": 6}
LIKELIHOODS = ("mse", "logit_laplace")


def build(seed: int = 0, **fields: object) -> DVAE:
    torch.manual_seed(seed)
    return DVAE(DVAESettings(**{**SMALL, **fields})).double()


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distopt.integrations.dalle.relaxed.gumbel", lambda like, generator: torch.zeros_like(like))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_repeating_a_batch_changes_nothing(likelihood: str, monkeypatch: pytest.MonkeyPatch):
    without_noise(monkeypatch)
    dvae, x = build(likelihood=likelihood), pictures(3)
    weights = {"tau": 0.7, "beta": 2.0, "usage": 0.3, "edges": 5.0}
    once, twice = dvae(x, **weights), dvae(torch.cat([x, x]), **weights)
    for a, b in zip(vars(once).values(), vars(twice).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_loss_is_the_bound_divided_by_the_subpixels(likelihood: str, monkeypatch: pytest.MonkeyPatch):
    without_noise(monkeypatch)
    dvae, x, tau, beta = build(likelihood=likelihood), pictures(2), 0.5, 6.6
    logits = dvae.encode(x)
    q = logits.softmax(1)
    kl = (q * (q * 8).log()).sum() / 2
    out = dvae.decoder(dvae.from_codes((logits / tau).softmax(1)))
    if likelihood == "mse":
        nll = ((0.5 + out / 2 - x) ** 2).sum() / 2
    else:
        mean, log_b = out[:, :3], out[:, 3:].clamp_min(dvae.settings.log_scale_floor)
        density = torch.distributions.TransformedDistribution(
            torch.distributions.Laplace(mean, log_b.exp()), [torch.distributions.SigmoidTransform()]
        )
        nll = -density.log_prob(0.8 * x + 0.1).sum() / 2
    expected = (nll + beta * kl) / (3 * 12 * 12)
    torch.testing.assert_close(dvae.loss(x, tau=tau, beta=beta).total, expected)


@given(st.floats(0.001, 0.999), st.floats(-2, 2), st.floats(-2, 1))
@settings(max_examples=50, deadline=None)
def test_logit_laplace_is_the_density_of_a_squashed_laplace(x: float, mean: float, log_b: float):
    inputs = [torch.tensor([v], dtype=torch.float64) for v in (x, mean, log_b)]
    laplace = torch.distributions.Laplace(inputs[1], inputs[2].exp())
    squashed = torch.distributions.TransformedDistribution(laplace, [torch.distributions.SigmoidTransform()])
    torch.testing.assert_close(logit_laplace(*inputs), -squashed.log_prob(0.8 * inputs[0] + 0.1))


def test_kl_and_idle_are_zero_for_uniform_codes_and_largest_for_one_code():
    dvae, x = build(), pictures(2)
    for bias, expected in ((0.0, 0.0), (1e4, math.log(8))):
        torch.nn.init.zeros_(dvae.to_logits.weight)
        dvae.to_logits.bias.data = torch.tensor([bias, *[0.0] * 7], dtype=torch.float64)
        loss = dvae.loss(x, tau=1.0)
        assert loss.kl.item() == pytest.approx(expected, abs=1e-12)
        assert loss.idle.item() == pytest.approx(expected, abs=1e-12)


def test_idle_is_zero_when_sure_cells_use_all_codes_equally(monkeypatch: pytest.MonkeyPatch):
    dvae = build(size=8, grid=2, codes=4)
    logits = 1e4 * torch.eye(4, dtype=torch.float64).reshape(1, 4, 2, 2)
    monkeypatch.setattr(dvae, "encode", lambda *_: logits.requires_grad_())
    loss = dvae.loss(torch.rand(1, 3, 8, 8, dtype=torch.float64), tau=1.0, usage=1.0)
    assert loss.idle.item() == pytest.approx(0.0, abs=1e-12)
    assert loss.kl.item() == pytest.approx(math.log(4))
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in dvae.parameters())


def test_gumbel_noise_is_finite_repeatable_and_standard():
    like = torch.zeros(200_000)
    noise = gumbel(like, torch.Generator().manual_seed(0))
    assert torch.equal(noise, gumbel(like, torch.Generator().manual_seed(0)))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_training_is_noisy_and_noise_comes_from_the_generator():
    dvae, x = build(logit_gain=1.0), pictures(2)
    first, same, other = (dvae.loss(x, tau=0.5, generator=torch.Generator().manual_seed(s)).total for s in (0, 0, 1))
    assert first == same
    assert first != other


def test_a_uniform_draw_of_zero_gives_finite_noise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert gumbel(torch.zeros(3)).isfinite().all()


def test_gumbel_noise_makes_the_argmax_a_sample_of_q():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(50_000, 3)
    drawn = (logits + gumbel(logits, torch.Generator().manual_seed(0))).argmax(1)
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.01)


@pytest.mark.parametrize(("kernels", "reach"), [((1,), 0), ((3,), 1), ((3, 3), 2)])
def test_a_token_sees_as_far_as_the_kernels_say(kernels: tuple[int, ...], reach: int):
    dvae = build(size=20, grid=5, encoder_kernels=kernels, decoder_kernels=kernels)
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64, requires_grad=True)
    dvae.encode(x)[0, :, 2, 2].sum().backward()
    seen = F.pixel_unshuffle(x.grad, 4).abs().amax((0, 1)) > 0
    z = torch.rand(1, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    F.pixel_unshuffle(dvae.decoder(dvae.from_codes(z)), 4)[0, :, 2, 2].sum().backward()
    acting = z.grad.abs().amax((0, 1)) > 0
    distance = (torch.arange(5) - 2).abs()
    expected = distance[:, None].maximum(distance) <= reach
    assert torch.equal(seen, expected)
    assert torch.equal(acting, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_tokens_are_the_argmax_row_by_row_and_come_back_as_pictures(likelihood: str):
    dvae, x = build(likelihood=likelihood), pictures(4)
    tokens = dvae.tokenize(x)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.reshape(4, 3, 3), dvae.encode(x).argmax(1))
    back = dvae.decode(tokens)
    assert back.shape == x.shape
    assert 0 <= back.min() <= back.max() <= 1
    assert torch.equal(back[:2], dvae.decode(tokens[:2]))


def test_codebook_rows_are_what_the_decoder_starts_from():
    dvae = build()
    torch.nn.init.normal_(dvae.from_codes.bias)
    z = F.one_hot(torch.arange(8)).double()[:, :, None, None]
    torch.testing.assert_close(dvae.codebook(), dvae.from_codes(z).flatten(1))


def test_fitted_codes_are_all_in_use_and_lead_by_the_gain():
    dvae, x = build(logit_gain=20.0), pictures(40)
    dvae.fit_codes(x, torch.Generator().manual_seed(0))
    assert len(dvae.tokenize(x).unique()) == 8
    best = dvae.encode(x).topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).mean().item() == pytest.approx(20.0)


def test_fitted_codebook_is_standardised_and_keeps_distances_between_patches():
    dvae, x = build(width=48), pictures(40)
    dvae.fit_codes(x, torch.Generator().manual_seed(0))
    book = dvae.codebook()
    assert book.shape == (8, 48)
    assert book.mean(0).abs().max().item() == pytest.approx(0.0, abs=1e-9)
    assert book.square().mean().item() == pytest.approx(1.0)
    # Rows lie to one another as the centres of the logits do, which the encoder's last layer holds.
    centres = dvae.to_logits.weight.detach().flatten(1)
    assert torch.corrcoef(torch.stack([torch.pdist(book), torch.pdist(centres)]))[0, 1] > 1 - 1e-9


def test_fitting_codes_to_one_flat_picture_stays_finite():
    dvae = build()
    dvae.fit_codes(torch.full((2, 3, 12, 12), 0.5, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert all(p.isfinite().all() for p in dvae.parameters())


def test_edge_weights_have_mean_one_in_each_picture_and_sit_at_steps():
    x = torch.zeros(2, 3, 12, 12)
    x[0, 1, :, 6:] = 1.0
    weights = edge_weights(x, 4.0)
    assert weights.mean((1, 2, 3)) == pytest.approx([1.0, 1.0])
    assert torch.allclose(weights[1], torch.ones(1, 12, 12))
    row = weights[0, 0, 3] / weights[0, 0, 3, 0]
    assert row.tolist() == pytest.approx([1.0] * 5 + [5.0, 5.0] + [1.0] * 5)


def test_separate_clusters_are_found():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = torch.cat([centres + 0.1 * torch.randn(4, 2) for _ in range(30)])
    for seed in range(5):
        found = kmeans(points, 4, generator=torch.Generator().manual_seed(seed))
        assert (torch.cdist(found, centres).min(0).values < 0.2).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("grid", 5),
        ("codes", 1),
        ("width", 1.5),
        ("neck", -1),
        ("encoder_kernels", (2,)),
        ("decoder_kernels", (3, 0)),
        ("likelihood", "l1"),
        ("log_scale_floor", math.nan),
        ("logit_gain", 0.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object):
    with pytest.raises(SettingError, match=f"DVAESettings.{field} is "):
        DVAESettings(**{**SMALL, field: value})


def test_settings_from_json_equal_those_they_were_saved_from():
    assert DVAESettings(encoder_kernels=[3, 1]) == DVAESettings(encoder_kernels=(3, 1))
