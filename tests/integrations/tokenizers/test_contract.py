"""What holds for every bottleneck, whatever it is inside."""

import copy

import pytest
import torch
from distopt.integrations.tokenizers import bottlenecks
from distopt.integrations.tokenizers.bottleneck import check
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError

SMALL = {
    "gaussian": {},
    "relaxed": {"usage": 0.1},
    "relaxed_st": {},
    "vq": {},
    "vq rotated": {"rotation": True},
    "ema": {},
    "ema rotated": {"rotation": True},
    "simvq": {},
    "simvq rotated": {"rotation": True},
    "simvq diagonal": {"diagonal": True},
    "simvq codes": {"train_codes": True},
    "simvq plain": {"bias": False},
    "fsq": {},
    "lfq": {},
}
DISCRETE = [name for name in SMALL if name != "gaussian"]


def made(name, codes=64, width=8, seed=0):
    torch.manual_seed(seed)
    return bottlenecks.build(name.split()[0], codes, width, **SMALL[name])


def inputs_of(bottleneck, seed=0, grid=5):
    return torch.randn(3, bottleneck.inputs, grid, grid, generator=torch.Generator().manual_seed(seed))


def test_every_kind_is_here():
    assert {name.split()[0] for name in SMALL} == set(bottlenecks.KINDS)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients(name):
    bottleneck = made(name)
    z = inputs_of(bottleneck).requires_grad_()
    out = bottleneck(z, generator=torch.Generator().manual_seed(0), temperature=0.7)
    assert out.vectors.shape == (3, bottleneck.outputs, 5, 5)
    assert out.vectors.dtype == torch.float32
    assert all(loss.shape == () and loss.isfinite() for loss in out.losses.values())
    out.vectors.square().sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.any()


@pytest.mark.parametrize("name", DISCRETE)
@given(seed=st.integers(0, 2**31), grid=st.integers(1, 6))
def test_eval_is_encode_and_lookup(name, seed, grid):
    bottleneck = made(name, seed=seed).eval()
    z = inputs_of(bottleneck, seed, grid)
    out, indices = bottleneck(z), bottleneck.encode(z)
    assert torch.equal(out.indices, indices)
    assert indices.dtype == torch.int64
    assert indices.shape == (3, grid, grid)
    assert 0 <= indices.min() <= indices.max() < bottleneck.codes
    assert torch.equal(bottleneck.lookup(indices), out.vectors)
    assert not bottleneck.lookup(indices).requires_grad


@pytest.mark.parametrize("name", DISCRETE)
def test_autocast_changes_no_index_and_no_vector(name):
    bottleneck = made(name, codes=1024).eval()
    z = inputs_of(bottleneck, grid=12)
    expected = bottleneck(z)
    with torch.autocast("cpu", torch.bfloat16):
        out = bottleneck(z)
        assert torch.equal(bottleneck.encode(z), expected.indices)
        assert torch.equal(bottleneck.lookup(expected.indices), expected.vectors)
    assert torch.equal(out.indices, expected.indices)
    assert torch.equal(out.vectors, expected.vectors)
    for loss in out.losses.values():
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", DISCRETE)
def test_inputs_of_16_bits_are_taken_as_they_are(name):
    bottleneck = made(name, codes=1024).eval()
    z = inputs_of(bottleneck, grid=12).bfloat16()
    assert torch.equal(bottleneck(z).indices, bottleneck(z.float()).indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_modules_of_any_precision_compute_in_float32(name, dtype):
    bottleneck = made(name).to(dtype)
    z = inputs_of(bottleneck).to(dtype).requires_grad_()
    bottleneck.start(z.detach(), torch.Generator().manual_seed(0))
    out = bottleneck(z, generator=torch.Generator().manual_seed(0))
    (out.vectors.square().sum() + sum(out.losses.values())).backward()
    assert out.vectors.dtype == torch.float32
    assert z.grad.dtype == dtype
    assert z.grad.isfinite().all()
    if name in DISCRETE:
        bottleneck.eval()
        assert torch.equal(bottleneck.lookup(bottleneck.encode(z)), bottleneck(z).vectors)


@pytest.mark.parametrize("name", DISCRETE)
def test_no_pictures_are_no_error(name):
    """A rank that has run out of pictures must still take part in what is collective."""
    bottleneck = made(name)
    before = copy.deepcopy(bottleneck.state_dict())
    out = bottleneck(inputs_of(bottleneck)[:0])
    assert out.vectors.shape == (0, bottleneck.outputs, 5, 5)
    assert bottleneck.encode(inputs_of(bottleneck)[:0]).shape == out.indices.shape == (0, 5, 5)
    assert bottleneck.lookup(out.indices).shape == out.vectors.shape
    after = bottleneck.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key != "updates")


@pytest.mark.parametrize("name", DISCRETE)
def test_an_index_that_is_none_is_refused(name):
    """The digits and bits of one too large would be those of another code."""
    bottleneck = made(name)
    with pytest.raises(SettingError, match=f"indices is {bottleneck.codes}, but must be whole numbers from 0 to"):
        bottleneck.lookup(torch.full((1, 2, 2), bottleneck.codes))
    with pytest.raises(SettingError, match="indices is -1, but must be"):
        bottleneck.lookup(torch.full((1, 2, 2), -1))


@pytest.mark.parametrize("name", SMALL)
def test_one_bad_batch_is_not_remembered(name):
    """Without gradients, that is: a step on a loss that is not finite is the optimizer's business."""
    bottleneck = made(name)
    bad = inputs_of(bottleneck)
    bad[0, 0, 0, 0] = float("nan")
    bottleneck(bad)
    assert all(value.isfinite().all() for value in bottleneck.state_dict().values())
    assert bottleneck(inputs_of(bottleneck)).vectors.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_data_that_are_all_alike_start_nothing_extreme(name):
    bottleneck = made(name, codes=16)
    bottleneck.start(torch.ones(3, bottleneck.inputs, 5, 5), torch.Generator().manual_seed(0))
    assert all(value.isfinite().all() and (value.abs() < 1e3).all() for value in bottleneck.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_eval_has_no_noise_and_no_memory(name):
    bottleneck = made(name).eval()
    z, before = inputs_of(bottleneck), copy.deepcopy(bottleneck.state_dict())
    assert torch.equal(bottleneck(z).vectors, bottleneck(z).vectors)
    assert all(torch.equal(before[key], value) for key, value in bottleneck.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_a_generator_decides_all_noise(name):
    bottleneck = made(name)
    other, z = copy.deepcopy(bottleneck), inputs_of(bottleneck)
    a = bottleneck(z, generator=torch.Generator().manual_seed(3)).vectors
    torch.manual_seed(99)
    assert torch.equal(a, other(z, generator=torch.Generator().manual_seed(3)).vectors)


@pytest.mark.parametrize("name", SMALL)
@given(seed=st.integers(0, 2**31))
def test_losses_do_not_depend_on_the_size_of_the_batch(name, seed):
    """A sum over the batch, or a division by 1 for "batchmean", would double here."""
    bottleneck = made(name, seed=seed).eval()
    z = inputs_of(bottleneck, seed)
    once, twice = bottleneck(z).losses, bottleneck(torch.cat([z, z])).losses
    for term, loss in once.items():
        assert torch.allclose(loss, twice[term], rtol=1e-4, atol=1e-6), term


@pytest.mark.parametrize("name", SMALL)
def test_a_state_is_all_there_is(name):
    bottleneck = made(name)
    z = inputs_of(bottleneck)
    for _ in range(3):
        bottleneck(z)
    other = made(name, seed=1)
    other.load_state_dict(bottleneck.state_dict())
    a, b = (each(z, generator=torch.Generator().manual_seed(0)) for each in (bottleneck, other))
    assert torch.equal(a.vectors, b.vectors)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in bottleneck.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_start_is_safe_for_every_kind(name):
    bottleneck = made(name, codes=16)
    bottleneck.start(inputs_of(bottleneck), torch.Generator().manual_seed(0))
    assert bottleneck(inputs_of(bottleneck)).vectors.isfinite().all()


@pytest.mark.parametrize("name", ["vq", "ema", "relaxed", "relaxed_st"])
def test_data_start_uses_every_code(name):
    bottleneck = made(name, codes=16).eval()
    z = inputs_of(bottleneck)
    bottleneck.start(z, torch.Generator().manual_seed(0))
    assert bottleneck.encode(z).unique().numel() == 16


def test_continuous_ones_have_no_indices():
    gaussian = made("gaussian")
    assert gaussian.codes is None
    assert gaussian(inputs_of(gaussian)).indices is None
    with pytest.raises(SettingError, match="must be a discrete one"):
        gaussian.encode(inputs_of(gaussian))
    with pytest.raises(SettingError, match="must be a discrete one"):
        gaussian.lookup(torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", bottlenecks.KINDS)
def test_unknown_options_are_named(name):
    with pytest.raises(SettingError, match=rf"^{name}\.beta_weight is 1, but must be left out: the options are "):
        bottlenecks.build(name, 16, 4, beta_weight=1)


def test_unknown_names_and_values():
    with pytest.raises(SettingError, match="bottleneck is 'vqvae', but must be one of gaussian, relaxed"):
        bottlenecks.build("vqvae", 16, 4)
    with pytest.raises(SettingError, match=r"VQ\.codes is 1, but must be a whole number from 2"):
        bottlenecks.build("vq", 1, 4)
    with pytest.raises(SettingError, match=r"SimVQ\.commitment_weight is -1, but must be a number from 0"):
        bottlenecks.build("simvq", 16, 4, commitment_weight=-1)
    with pytest.raises(SettingError, match=r"LFQ\.codes is 100, but must be a power of two"):
        bottlenecks.build("lfq", 100, 4)
    with pytest.raises(SettingError, match=r"FSQ\.levels is 5, but must be a list of whole numbers"):
        bottlenecks.build("fsq", 100, 4, levels=5)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [("vq", "rotation"), ("ema", "rotation"), ("simvq", "bias"), ("simvq", "diagonal"), ("simvq", "train_codes")],
)
@pytest.mark.parametrize("value", ["no", 0, None])
def test_a_flag_is_true_or_false(kind, flag, value):
    """From the command line: the text "no" would count as true."""
    with pytest.raises(SettingError, match=rf"\.{flag} is {value!r}, but must be true or false"):
        bottlenecks.build(kind, 16, 4, **{flag: value})


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), 0, 11])
def test_check_refuses(value):
    with pytest.raises(SettingError):
        check("a", value, 1, 10)


def test_whole_numbers():
    check("a", 3, 1, 10, whole=True)
    with pytest.raises(SettingError, match="whole"):
        check("a", 3.0, 1, 10, whole=True)
