"""Draws image codes for captions, one position at a time, with the keys and values of earlier positions kept.

Source: Ramesh et al. 2021, section 2.2 and figure 2 (temperature, completion of a given top of a picture). Guidance is
of a later time: Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022.
"""

import dataclasses

import torch
from torch import Tensor

from distopt.errors import SettingError

from .cache import Cache
from .text import PAD
from .transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How one free sample is drawn for each caption; the fields are those of `sample`.

    Raises:
        SettingError: where a value is out of its range.
    """

    temperature: float = 0.3
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.5

    def __post_init__(self) -> None:
        _check(self.temperature, self.top_k, self.top_p, self.guidance)


def filter_logits(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Shape a distribution before drawing from it.

    Args:
        logits: ``(B, K)``.
        temperature: divides the logits; 0 keeps the most likely code alone.
        top_k: keep this many of the most likely codes; ``None`` keeps all.
        top_p: then keep the most likely codes up to the first whose cumulated probability reaches ``top_p``.

    Returns:
        Logits ``(B, K)``, minus infinity where a code is left out; at least one code is left.

    Example:
        >>> filter_logits(torch.tensor([[2.0, 1.0, 0.0]]), temperature=1.0, top_k=2, top_p=None)
        tensor([[2., 1., -inf]])
    """
    _check(temperature, top_k, top_p)
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits = logits / temperature
    if top_k is None and top_p is None:
        return logits
    # Ranks, not a threshold: among equal logits exactly top_k stay.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        probability = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= probability.cumsum(-1) - probability < top_p
    ordered = ordered.masked_fill(~keep, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


@torch.no_grad()
def sample(
    transformer: Transformer,
    text: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    prompt: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one picture's codes for each caption.

    Args:
        transformer: the model; it is run as it is, so put it into eval mode first.
        text: ``(B, T)`` int64 with ``PAD``.
        temperature: see ``filter_logits``.
        top_k: see ``filter_logits``.
        top_p: see ``filter_logits``.
        guidance: s in ``u + s (c - u)`` with the logits c under the caption and u under an empty one; 1 is plain
            sampling. Others need a model that was trained with captions dropped, and twice the time.
        prompt: ``(B, n)`` int64, the first n codes of each picture in raster order, with n up to G; they are kept, and
            the rest is drawn after them. ``None`` draws all.
        generator: on the device of ``text``; decides every draw.

    Returns:
        ``(B, G)`` int64, a tensor of its own.

    Raises:
        SettingError: where a value is out of its range, or the prompt is not of the model's codes.

    Example:
        >>> from .transformer import TransformerSettings
        >>> settings = TransformerSettings(text_vocabulary=9, text_length=4, codes=8, grid=2, width=16, heads=2)
        >>> text, top = torch.tensor([[1, 2, 3, PAD]]), torch.tensor([[5, 7]])
        >>> sample(Transformer(settings).eval(), text, prompt=top)[:, :2]
        tensor([[5, 7]])
    """
    _check(temperature, top_k, top_p, guidance)
    captions, guided = len(text), guidance != 1
    codes = text.new_empty(captions, 0) if prompt is None else _checked(prompt, captions, transformer)
    if guided:
        text, codes = torch.cat([text, torch.full_like(text, PAD)]), torch.cat([codes, codes])
    known = codes.shape[1]
    cache = Cache()
    first = transformer.embed_text(text)
    if known:
        first = torch.cat([first, transformer.embed_image(codes, slice(0, known))], dim=1)
    transformer.hidden(first, cache)
    for slot in range(known, transformer.settings.image_length):
        hidden = transformer.hidden(transformer.embed_image(codes, slice(slot, slot + 1)), cache)
        logits = transformer.image_logits(hidden[:, -1])
        if guided:
            under, empty = logits.split(captions)
            logits = empty + guidance * (under - empty)
        probability = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p).softmax(-1)
        drawn = torch.multinomial(probability, 1, generator=generator)
        codes = torch.cat([codes, torch.cat([drawn, drawn]) if guided else drawn], dim=1)
    return codes[:captions].clone()


def _checked(prompt: Tensor, captions: int, transformer: Transformer) -> Tensor:
    """The prompt, if it can be one."""
    codes, most = transformer.settings.codes, transformer.settings.image_length
    if prompt.ndim != 2 or len(prompt) != captions or prompt.shape[1] > most:
        raise SettingError("prompt", f"of shape {tuple(prompt.shape)}", f"of shape ({captions}, n) with n up to {most}")
    if prompt.dtype != torch.int64 or (prompt.numel() and not 0 <= prompt.min() <= prompt.max() < codes):
        raise SettingError("prompt", prompt, f"whole numbers (int64) from 0 to {codes - 1}")
    return prompt


def _check(temperature: float, top_k: int | None, top_p: float | None, guidance: float = 1.0) -> None:
    if not 0 <= temperature < float("inf"):
        raise SettingError("temperature", temperature, "a finite number of at least 0")
    if not 0 <= guidance < float("inf"):
        raise SettingError("guidance", guidance, "a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise SettingError("top_k", top_k, "at least 1, or None for all codes")
    if top_p is not None and not 0 < top_p <= 1:
        raise SettingError("top_p", top_p, "above 0 and at most 1, or None for all codes")
