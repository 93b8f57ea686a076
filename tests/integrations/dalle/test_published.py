"""Weights in the published layout come in and go out unchanged; anything else is refused in a line, and never run."""

import pickle
from pathlib import Path

import pytest
import torch
from distopt.integrations.dalle.paper_dvae import PaperDVAE, PaperDVAESettings
from distopt.integrations.dalle.published import find_published, load_published, published_settings, save_published
from distopt.integrations.dalle.settings import InputError

from distopt.errors import SettingError

SHAPE = PaperDVAESettings(size=16, codes=24, n_hid=8, n_init=6, groups=3, blocks=1)


@pytest.fixture
def dvae() -> PaperDVAE:
    torch.manual_seed(0)
    return PaperDVAE(SHAPE)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_written_is_read_back(dvae: PaperDVAE, tmp_path: Path):
    save_published(dvae, tmp_path)
    files = find_published(tmp_path)
    assert [file.name for file in files] == ["encoder.safetensors", "decoder.safetensors"]
    assert published_settings(*files, 16) == SHAPE
    loaded = load_published(*files, 16)
    assert same(loaded, dvae)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(2, 3, 24, 24)
    assert torch.equal(load_published(*files, 24).tokenize(x), dvae.tokenize(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_state_dicts_of_torch_are_read_and_kept_in_float32(dvae: PaperDVAE, tmp_path: Path, dtype: torch.dtype):
    for part in ("encoder", "decoder"):
        weights = {name: tensor.to(dtype) for name, tensor in getattr(dvae, part).state_dict().items()}
        torch.save(weights, tmp_path / f"{part}.pt")
    loaded = load_published(*find_published(tmp_path), 16)
    assert same(loaded, dvae.to(dtype).float())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code was run')",)


def test_pickled_modules_are_never_run_and_the_refusal_tells_how_to_convert(dvae: PaperDVAE, tmp_path: Path):
    torch.save(dvae.encoder, tmp_path / "encoder.pkl")
    (tmp_path / "decoder.pkl").write_bytes(pickle.dumps(Trap(), protocol=2))
    files = find_published(tmp_path)
    for file in files:
        with pytest.raises(InputError, match=r"pickled module.*state_dict\(\)") as caught:
            load_published(file, file)
        assert "\n" not in str(caught.value)


def test_other_names_and_shapes_are_refused_by_name(dvae: PaperDVAE, tmp_path: Path):
    save_published(dvae, tmp_path)
    encoder, decoder = find_published(tmp_path)
    with pytest.raises(InputError, match=r"encoder and a decoder|must be"):
        load_published(decoder, encoder, 16)
    weights = dict(dvae.encoder.state_dict())
    name = "blocks.group_2.block_1.res_path.conv_2.w"
    for change, words in (
        ({name: None}, rf"{name} is nothing, but must be \(4, 4, 3, 3\)"),
        ({name: torch.zeros(4, 4, 1, 1)}, rf"{name} is \(4, 4, 1, 1\), but must be"),
        ({"blocks.more": torch.zeros(1)}, r"blocks.more is \(1,\), but must be nothing"),
        ({"blocks.input.w": None}, "there is no blocks.input.w"),
    ):
        changed = {key: tensor for key, tensor in {**weights, **change}.items() if tensor is not None}
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(InputError, match=words):
            load_published(tmp_path / "changed.pt", decoder, 16)
    with pytest.raises(SettingError, match="size is 18"):
        load_published(encoder, decoder, 18)


def test_missing_and_damaged_files_are_refused(dvae: PaperDVAE, tmp_path: Path):
    with pytest.raises(InputError, match="has no encoder"):
        find_published(tmp_path)
    save_published(dvae, tmp_path)
    encoder, decoder = find_published(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        load_published(tmp_path / "none.pt", decoder)
    encoder.write_bytes(encoder.read_bytes()[:-8])
    with pytest.raises(InputError, match="is damaged"):
        load_published(encoder, decoder)
    (tmp_path / "encoder.pt").write_bytes(b"not a file of torch")
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        load_published(tmp_path / "encoder.pt", decoder)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        load_published(tmp_path / "list.pt", decoder)
