"""Which parameters low-rank compression leaves alone, decided from the modules that own them."""

import fnmatch
import re
from collections.abc import Iterator, Sequence

from torch import nn

UNEMBEDDINGS = ("*lm_head*", "*unembed*")
"""Names of linear layers that produce logits over a vocabulary: nothing in a bare ``nn.Linear`` gives that away."""

_NORM = re.compile(r"Norm(\dd)?$")


def exempt_names(model: nn.Module) -> frozenset[str]:
    """Name the parameters of a model that are sent whole: vectors, norms, embeddings, unembeddings.

    Gradients of embeddings are sparse in rows, those of norms and biases are small and decide much: the papers exempt
    them alike (Ramesh et al. 2021, appendix D, guideline 2). A parameter tied to an embedding is one. Norms
    and embeddings are known by the name of their class or of one that it derives from, as in ``nn.BatchNorm2d``,
    ``LlamaRMSNorm``, ``BertEmbeddings``; with a parametrisation, such as a spectral norm, they stay what they are.

    Args:
        model: any module, without its DDP wrapper.

    Returns:
        Names as in ``model.named_parameters()``.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "mix": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
        >>> sorted(exempt_names(model))
        ['embed.weight', 'lm_head.bias', 'lm_head.weight', 'mix.bias']
    """
    owned = {id(p) for module in model.modules() if _is_exempt(module) for p in _own_parameters(module)}
    return frozenset(
        name
        for name, p in model.named_parameters()
        if id(p) in owned or sum(side > 1 for side in p.shape) < 2 or _matches(name, UNEMBEDDINGS)
    )


def is_exempt_by_name(name: str) -> bool:
    """Tell an embedding, an unembedding or a norm by its parameter's name, where the modules are out of sight.

    Example:
        >>> is_exempt_by_name("transformer.embeddings.weight"), is_exempt_by_name("transformer.mlp.weight")
        (True, False)
    """
    return _matches(name.lower(), (*UNEMBEDDINGS, "*embed*", "*norm*"))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_exempt(module: nn.Module) -> bool:
    kinds = [kind.__name__ for kind in type(module).__mro__]
    return any(_NORM.search(kind) or "Embedding" in kind for kind in kinds)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the module itself, also where a parametrisation computes them from others."""
    yield from module.parameters(recurse=False)
    if isinstance(originals := getattr(module, "parametrizations", None), nn.ModuleDict):
        for original in originals.values():
            yield from original.parameters(recurse=False)


def plain_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")
