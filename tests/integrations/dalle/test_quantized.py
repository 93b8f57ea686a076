"""Stage 1 with other bottlenecks: each is trained, saved, resumed and judged as the relaxed one is, by one setting."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import architectures, demo, evaluate, recipe, runs
from distopt.integrations.dalle.architectures import build, from_table, nearest_codes, quantized, to_table
from distopt.integrations.dalle.checkpoints import RunCheckpoints
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.paper_dvae import PaperDVAESettings
from distopt.integrations.dalle.plan import plan_lines
from distopt.integrations.dalle.quantized import QuantizedSettings, QuantizedVAE
from distopt.integrations.dalle.settings import (
    BOTTLENECKS,
    RELAXED,
    CheckpointOptions,
    DemoSettings,
    Stage1Options,
    TokenizerOptions,
    TrainSettings,
)
from distopt.integrations.dalle.settings import build as checked
from distopt.integrations.dalle.stage1 import train_dvae
from distopt.integrations.dalle.stage1_settings import Stage1Settings, quantized_settings, settings_of
from distopt.integrations.dalle.train import recipe_of
from distopt.integrations.running.journal import RunJournal
from hypothesis import given, settings
from hypothesis import strategies as st

import distopt
from distopt.errors import SettingError
from tests.integrations.dalle.test_checkpoints import small
from tests.integrations.dalle.test_stage2 import Flags
from tests.processes import run_ranks

SHAPE = DVAESettings(size=8, grid=2, codes=8, width=16, neck=8)
PAPER = PaperDVAESettings(size=8, codes=8, n_hid=8, n_init=8, groups=3, blocks=1)
KINDS = [(kind, {}) for kind in BOTTLENECKS if kind not in RELAXED]
TURNED = [(kind, {"rotation": True}) for kind in ("vq", "ema", "simvq")]
every_kind = pytest.mark.parametrize(("kind", "options"), [*KINDS, *TURNED], ids=str)


def shape(kind, networks=SHAPE, **options):
    return quantized(networks, TokenizerOptions(bottleneck=kind, **({"dimension": 4} if options else {}), **options))


def how(kind, **more):
    return quantized_settings(kind, **{"steps": 8, "batch": 8, "start": 16} | more)


def whole(kind, options, precision="fp32", shards=1):
    """Both stages in a second, with this bottleneck in the first."""
    plain = small(precision, shards)
    dvae = shape(kind, **options)
    return dataclasses.replace(plain, dvae=dvae, stage1=how(kind, clip=0.1))


def same(one, other):
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in one.state_dict().items())


class Broken(Flags):
    """Fails after so many draws."""

    def __init__(self, last):
        self.left = last

    def pictures(self, n, rng):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().pictures(n, rng)


def go(chosen, out, source):
    saver = RunCheckpoints(out / "checkpoints", CheckpointOptions(every_steps=3, every_seconds=0.0), Context())
    return recipe.train(source, chosen, Context(seed=1), RunJournal(None, shown=False), saver)


@every_kind
def test_a_run_that_is_cut_off_goes_on_to_the_bit_and_is_loaded_as_it_was_saved(tmp_path, kind, options):
    chosen = whole(kind, options)
    undisturbed = go(chosen, tmp_path / "whole", Flags())
    with pytest.raises(KeyboardInterrupt):
        go(chosen, tmp_path, Broken(6))  # the start, and five steps
    resumed = go(chosen, tmp_path, Flags())
    assert same(undisturbed.model.dvae, resumed.model.dvae)
    assert undisturbed.stages[0].curve == resumed.stages[0].curve
    assert undisturbed.stages[1].final_loss == resumed.stages[1].final_loss

    resumed.model.save(tmp_path, "folder", {})
    loaded = Model.load(runs.open_run(tmp_path), torch.device("cpu"))
    assert loaded.dvae.settings == chosen.dvae
    pictures = Flags().pictures(16, np.random.default_rng(0))
    tokens = loaded.dvae.tokenize(pictures)
    assert torch.equal(tokens, undisturbed.model.dvae.tokenize(pictures))
    assert torch.equal(loaded.dvae.decode(tokens), undisturbed.model.dvae.decode(tokens))
    assert np.array_equal(loaded.draw(["red over blue"], 0), resumed.model.draw(["red over blue"], 0))


@pytest.mark.parametrize(
    ("kind", "options", "networks"),
    [*((*each, SHAPE) for each in (*KINDS, *TURNED)), ("simvq", {}, PAPER), ("fsq", {}, PAPER)],
    ids=str,
)
def test_each_learns_and_leaves_torch_alone(kind, options, networks):
    state = torch.get_rng_state()
    told = []

    class Journal:
        def log(self, step, total, values):
            told.append(values)

    training = how(kind, steps=60, learning_rate=4e-3, edges=0.0)
    result = train_dvae(Flags(), shape(kind, networks, **options), training, Context(seed=2, journal=Journal()))
    first, last = (np.mean([values["reconstruction"] for values in of]) for of in (told[:6], told[-6:]))
    assert last < first - 0.02
    assert all(1 <= values["used"] <= 8 for values in told)
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.model.training
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


@every_kind
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-3, 3))
def test_what_tokens_decode_to_is_what_the_loss_is_of(kind, options, seed, shift):
    """In eval mode, whatever the weights: decode(tokenize(x)) has the squared error that the loss tells."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build(shape(kind, **options)).eval()
        with torch.no_grad():
            vae.networks.to_logits.bias += shift
        pictures = torch.rand(3, 3, 8, 8)
    tokens = vae.tokenize(pictures)
    assert tokens.shape == (3, 4)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vae.settings.codes
    shown = vae.networks.render(vae.bottleneck.lookup(tokens.unflatten(1, (2, 2)))) * 0.5 + 0.5
    assert torch.allclose(vae.loss(pictures).reconstruction, (shown - pictures).square().mean(), rtol=1e-5)
    assert torch.equal(vae.decode(tokens), shown.clamp(0, 1))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.train()
    assert torch.equal(vae.tokenize(pictures), tokens)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def on_two_ranks(rank):
    torch.set_num_threads(1)
    found = {}
    for kind in ("vq", "ema", "simvq", "lfq"):
        for shards, reducer in ((1, distopt.AllReduce()), (2, distopt.AllReduce()), (1, distopt.PowerSGD(rank=1))):
            context = Context(rank=rank, world_size=2, reducer=reducer, shards=shards)
            result = train_dvae(Flags(), shape(kind), how(kind, steps=4), context)
            state = {name: value.numpy() for name, value in result.model.state_dict().items()}
            found[kind, f"{type(reducer).__name__}, {shards}"] = state, result.final_loss
    return found


def test_ranks_end_with_the_same_codes_to_the_bit_sharded_or_not():
    first, second = run_ranks(2, on_two_ranks, timeout=100)
    for key, (state, loss) in first.items():
        other, its_loss = second[key]
        assert loss != its_loss, key
        for name, value in state.items():
            assert np.isfinite(value).all(), (key, name)
            assert (value == other[name]).all(), (key, name)
    for kind in {kind for kind, _ in first}:
        for name, value in first[kind, "AllReduce, 1"][0].items():
            assert abs(value - first[kind, "AllReduce, 2"][0][name]).max() < 1e-3, (kind, name)


def start_on(rank, world_size):
    context = Context(rank=rank, world_size=world_size)
    from distopt.integrations.dalle.stage1 import _start

    return {
        name: value.numpy() for name, value in _start(Flags(), shape("vq"), how("vq"), context).state_dict().items()
    }


def test_codes_start_from_the_same_pictures_on_any_number_of_ranks():
    alone = start_on(0, 1)
    for state in run_ranks(2, start_on, 2):
        assert all(np.allclose(state[name], value, atol=1e-6) for name, value in alone.items())
    assert len(np.unique(alone["bottleneck.embedding.weight"], axis=0)) > 4


@pytest.mark.parametrize(
    ("kind", "options", "precision"),
    [(kind, options, ("bf16", "fp16")[i % 2]) for i, (kind, options) in enumerate((*KINDS, *TURNED))],
)
def test_the_bottleneck_is_in_float32_under_every_precision(monkeypatch, kind, options, precision):
    seen = []
    plain = QuantizedVAE.__init__

    def watched(self, settings):
        plain(self, settings)
        self.bottleneck.register_forward_pre_hook(
            lambda _, given: seen.append((given[0].dtype, torch.is_autocast_enabled("cpu")))
        )

    monkeypatch.setattr(QuantizedVAE, "__init__", watched)
    result = train_dvae(Flags(), shape(kind, **options), how(kind, steps=4), Context(precision=precision))
    assert seen == [(torch.float32, False)] * 4
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


@given(seed=st.integers(0, 2**31), tau=st.floats(0.1, 2.0))
@settings(max_examples=20, deadline=None)
def test_straight_through_hands_on_one_code_and_the_gradient_of_the_relaxation(seed, tau):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dvae, pictures, noise = DVAE(SHAPE).double(), torch.rand(2, 3, 8, 8).double(), torch.randn(2, 8, 2, 2).double()
        weights = torch.randn(8).double()
    handed = []
    dvae.render = lambda z, dtype: handed.append(z) or torch.zeros(2, 3, 8, 8).double()
    gradients = []
    for hard in (False, True):
        dvae.loss(pictures, tau=tau, hard=hard, noise=noise)
        dvae.zero_grad()
        (handed[-1] * weights[:, None, None]).sum().backward()
        gradients.append(dvae.to_logits.weight.grad.clone())
    soft, one = handed
    assert torch.equal(one.detach().round(), one.detach().round().clamp(0, 1))
    assert torch.allclose(one, one.round(), atol=1e-12)
    assert torch.equal(one.argmax(1), soft.argmax(1))
    assert torch.allclose(one.sum(1), torch.ones(2, 2, 2).double())
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-9)


def test_without_the_setting_all_is_as_it_was():
    assert architectures.settings_of(Stage1Options(), 32) == DVAESettings(size=32, grid=8)
    assert settings_of(Stage1Options()) == Stage1Settings()
    assert set(to_table(DVAESettings())) == {"architecture", *(f.name for f in dataclasses.fields(DVAESettings))}
    chosen = demo.recipe_of(DemoSettings())
    assert (chosen.dvae, chosen.stage1) == (DVAESettings(), Stage1Settings(steps=3_700))
    assert "hard" not in Stage1Settings().weights_at(0)
    straight = demo.recipe_of(DemoSettings(stage1=TokenizerOptions(bottleneck="relaxed_st")))
    assert (straight.dvae, straight.stage1) == (DVAESettings(), Stage1Settings(steps=3_700, hard=True))
    assert settings_of(Stage1Options(bottleneck="relaxed_st", tau=(1.0, 0.5))) == Stage1Settings(
        hard=True, tau=(1.0, 0.5)
    )


def test_the_setting_becomes_a_bottleneck_of_both_architectures_and_comes_back_from_a_table():
    options = Stage1Options(bottleneck="simvq", codes=64, dimension=8, commitment=0.5, rotation=True)
    found = architectures.settings_of(options, 24)
    assert found == QuantizedSettings(
        networks=DVAESettings(codes=64),
        bottleneck="simvq",
        dimension=8,
        options={"commitment_weight": 0.5, "rotation": True},
    )
    paper = architectures.settings_of(Stage1Options(bottleneck="fsq", architecture="paper", patch=4), 24)
    assert isinstance(paper.networks, PaperDVAESettings)
    for each in (found, paper):
        assert from_table(json.loads(json.dumps(to_table(each)))) == each
        assert (each.tokens, each.grid, each.size) == (36, 6, 24)
        assert build(each).bottleneck.codes == each.codes
    turned = architectures.settings_of(Stage1Options(bottleneck="vq", rotation=True), 24)
    assert turned.options == {"rotation": True, "commitment_weight": 1.0}
    assert settings_of(Stage1Options(architecture="paper", bottleneck="vq")).learning_rate == 1e-4
    for kind, codes in (("fsq", 192), ("lfq", 256), ("ema", 192)):
        assert demo.recipe_of(DemoSettings(stage1=TokenizerOptions(bottleneck=kind))).dvae.codes == codes
    lines = plan_lines(recipe_of(checked(TrainSettings, {"stage1": {"bottleneck": "simvq"}})), 1, 10)
    assert "bottleneck simvq, learning rate" in lines[1]


@given(kind=st.sampled_from([kind for kind, _ in KINDS]), codes=st.integers(2, 65_536))
@settings(deadline=None)
def test_the_nearest_number_of_codes_is_one_that_the_bottleneck_has(kind, codes):
    nearest = nearest_codes(kind, codes)
    assert nearest_codes(kind, nearest) == nearest
    assert codes / 1.5 < nearest < codes * 1.5 + 1
    small = dataclasses.replace(SHAPE, codes=min(nearest, 2048))
    if small.codes == nearest:
        assert build(shape(kind, small)).bottleneck.codes == nearest


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"bottleneck": "gaussian"}, "stage1.bottleneck is 'gaussian', but must be one of relaxed, relaxed_st, vq"),
        ({"bottleneck": "vq", "tau": [1.0, 0.5]}, r"stage1.tau is .* left out: bottleneck is vq, it is of relaxed, "),
        ({"bottleneck": "lfq", "usage": 0.1}, "stage1.usage is 0.1, but must be left out: bottleneck is lfq"),
        ({"bottleneck": "fsq", "rotation": True}, "stage1.rotation is True, .* bottleneck is fsq, it is of vq, ema"),
        ({"dimension": 8}, "stage1.dimension is 8, but must be left out: bottleneck is relaxed"),
        ({"bottleneck": "vq", "dimension": 0}, "stage1.dimension is 0, but must be a whole number from 1 to"),
        (
            {"bottleneck": "vq", "architecture": "paper", "weights": "x"},
            "stage1.bottleneck is 'vq', but must be relaxed, which the published",
        ),
    ],
)
def test_what_a_bottleneck_has_not_is_refused(table, words):
    with pytest.raises(SettingError, match=words):
        checked(TrainSettings, {"stage1": table})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--stage1.bottleneck", "fsq", "--stage1.codes", "1024"],
            "stage1.codes is 1024, but must be 1000, the nearest",
        ),
        (["--stage1.bottleneck", "lfq", "--stage1.codes", "192"], "stage1.codes is 192, but must be 256, the nearest"),
        (["--stage1.bottleneck", "vqq"], "--stage1.bottleneck is 'vqq', but must be one of relaxed"),
    ],
)
def test_the_commands_refuse_in_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").touch()
    for command in (["demo"], ["train", "--data", str(tmp_path / "data")]):
        assert main([*command, "--out", str(tmp_path / "run"), *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err


def test_a_demo_with_a_quantizer_is_evaluated_and_sampled_as_any_other(tmp_path, monkeypatch, capsys):
    judge = evaluate.evaluate_tokenizer
    monkeypatch.setattr(evaluate, "evaluate_tokenizer", lambda *given, **named: judge(*given, **named, n=8))
    monkeypatch.setattr(demo, "DVAESettings", lambda: DVAESettings(codes=16, width=16, neck=8))
    chosen = DemoSettings(steps_1=3, steps_2=2, steps_3=0, n=4, stage1=TokenizerOptions(bottleneck="simvq"))
    demo.run(chosen, tmp_path, Context())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokenizer"]["codes"] == 16
    assert "tau" not in report["training"]["stage1"]
    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "-ELBO: none, for a quantizer gives no distribution over codes" in shown
    again = json.loads(shown.strip().splitlines()[-1])
    assert again["measures"]["s0"]["bound"] is None
    assert again["measures"]["s0"]["mse"] > 0
    assert {name: again[name] for name in ("tokenizer", "s0")} == {name: report[name] for name in ("tokenizer", "s0")}
    picture = tmp_path / "red.png"
    assert main(["sample", "--run", str(tmp_path), "--caption", "a red circle", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 0
