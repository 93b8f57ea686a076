"""Reads and writes the paper's dVAE as two state dicts with the names and shapes of the published encoder and decoder.

The files are safetensors, or what ``torch.save`` made of a state dict. The published ``encoder.pkl`` and
``decoder.pkl`` hold whole pickled modules: reading them runs code that lies in the file, so they are never read here.
Convert them once, where you trust them and have the package ``dall_e`` installed::

    import torch
    for part in ("encoder", "decoder"):
        torch.save(torch.load(part + ".pkl", weights_only=False).state_dict(), part + ".pt")

Biases are vectors; the weights of a convolution have the shape (outputs, inputs, k, k). Size, width, groups and codes
are taken from the shapes.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .paper_dvae import PaperDVAE, PaperDVAESettings
from .settings import InputError

_PARTS = ("encoder", "decoder")
_ENDINGS = (".safetensors", ".pt", ".pth", ".pkl")
_NOT_TENSORS = (
    "cannot be read as tensors alone: it is damaged, or a whole pickled module, whose code would run; where you trust "
    "it, convert it once: torch.save(torch.load(FILE, weights_only=False).state_dict(), 'FILE.pt')"
)


def find_published(folder: Path) -> tuple[Path, Path]:
    """The files of the encoder and of the decoder in ``folder``.

    Args:
        folder: has ``encoder`` and ``decoder``, each ending with .safetensors, .pt or .pth.

    Raises:
        InputError: one of them is missing.
    """
    found: list[Path] = []
    for part in _PARTS:
        files = [folder / (part + ending) for ending in _ENDINGS if (folder / (part + ending)).is_file()]
        if not files:
            raise InputError(f"{folder}: has no {part}.safetensors or {part}.pt")
        found.append(files[0])
    return found[0], found[1]


def published_settings(encoder: Path, decoder: Path, size: int = 256) -> PaperDVAESettings:
    """Tell the shape of a dVAE from its files.

    Args:
        encoder: state dict of the encoder.
        decoder: state dict of the decoder.
        size: side of the pictures, in pixels.

    Returns:
        Settings that the shapes agree with; whether all tensors are there is for ``load_published`` to see.

    Raises:
        InputError: a file cannot be read, or is not of an encoder or decoder.
        SettingError: the size does not suit the model.
    """
    first, second = _read(encoder), _read(decoder)
    groups = {int(found[1]) for name in first if (found := re.match(r"blocks\.group_(\d+)\.", name))}
    blocks = {int(found[1]) for name in first if (found := re.match(r"blocks\.group_1\.block_(\d+)\.", name))}
    try:
        width, codes = len(first["blocks.input.w"]), len(first["blocks.output.conv.w"])
        n_init, outputs = len(second["blocks.input.w"]), len(second["blocks.output.conv.w"])
    except KeyError as error:
        file = decoder if "blocks.output.conv.w" in first and "blocks.input.w" in first else encoder
        raise InputError(f"{file}: is not in the published layout: there is no {error.args[0]}") from None
    if outputs not in (3, 6) or not groups or not blocks:
        raise InputError(f"{encoder}, {decoder}: are not an encoder and a decoder in the published layout")
    likelihood = "logit_laplace" if outputs == 6 else "mse"
    return PaperDVAESettings(
        size=size,
        codes=codes,
        n_hid=width,
        n_init=n_init,
        groups=max(groups),
        blocks=max(blocks),
        likelihood=likelihood,
    )


def load_published(encoder: Path, decoder: Path, size: int = 256) -> PaperDVAE:
    """Load a dVAE in the published layout.

    Args:
        encoder: state dict of the encoder.
        decoder: state dict of the decoder.
        size: side of the pictures that it will be given, in pixels; the networks take any multiple of the patch.

    Returns:
        The dVAE in eval mode, float32, on the CPU; not to be trained any more.

    Raises:
        InputError: a file cannot be read, or names and shapes are not the published ones.
        SettingError: the size does not suit the model.
    """
    with torch.device("meta"):
        dvae = PaperDVAE(published_settings(encoder, decoder, size))
    for part, file in ((dvae.encoder, encoder), (dvae.decoder, decoder)):
        tensors, wanted = _read(file), part.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            here = tuple(tensors[name].shape) if name in tensors else "nothing"
            there = tuple(wanted[name].shape) if name in wanted else "nothing"
            if here != there:
                raise InputError(f"{file}: {name} is {here}, but must be {there}")
        part.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return dvae.requires_grad_(False).eval()


def save_published(dvae: PaperDVAE, folder: Path) -> None:
    """Write ``encoder.safetensors`` and ``decoder.safetensors`` in the published layout.

    Args:
        dvae: whose weights.
        folder: must exist.
    """
    for part in _PARTS:
        tensors = {name: t.detach().cpu().contiguous() for name, t in getattr(dvae, part).state_dict().items()}
        (folder / f"{part}.safetensors").write_bytes(save(tensors))


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{file}: is damaged: {error}") from None
    # torch raises errors of many kinds for what it cannot read.
    except Exception:
        raise InputError(f"{file}: {_NOT_TENSORS}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{file}: {_NOT_TENSORS}")
    return tensors
