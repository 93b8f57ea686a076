"""Shapes of the parameters whose gradients are compressed."""

from collections.abc import Callable, Iterator, Mapping, Sequence

Shapes = Sequence[tuple[int, ...]]


def resnet50() -> Shapes:
    """Parameters of ResNet-50, in their order (He et al. 2015, table 1)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, inside, 1, 1), (4 * width,), (4 * width,)]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """Parameters of GPT-2 with 124 million of them (Radford et al. 2019)."""
    return [(50257, 768), (1024, 768), *_blocks(768, 12), (768,), (768,)]


def dalle_demo() -> Shapes:
    """Parameters of the transformer that this repository's DALL-E trains as a demonstration."""
    # Here, so that the other shapes are to be had where the integration is not.
    from distopt.integrations.dalle.transformer import Transformer, TransformerSettings

    from bench.dalle_speed import SIZES

    settings = TransformerSettings(**SIZES["demo"].settings)
    return [tuple(parameter.shape) for parameter in Transformer(settings).parameters()]


def gpt2_xl() -> Shapes:
    """Parameters of a GPT-2 with 1.3 billion of them: 24 layers of width 2048."""
    return [(50257, 2048), (1024, 2048), *_blocks(2048, 24), (2048,), (2048,)]


def dalle_12b(layers: int = 1) -> Shapes:
    """What one of eight GPUs of a node holds of layers of the 12-billion model: an eighth of the rows, width 3968."""
    width, gpus = 3968, 8
    sides = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return layers * [shape for rows, columns in sides for shape in ((rows // gpus, columns), (rows // gpus,))]


def _blocks(width: int, layers: int) -> Iterator[tuple[int, ...]]:
    for _ in range(layers):
        for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            yield (rows, columns)
            yield (rows,)
        yield from [(width,)] * 4


MODELS: Mapping[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "gpt2": gpt2,
    "dalle-demo": dalle_demo,
    "dalle-12b-slice": dalle_12b,
}

TINY: Mapping[str, Callable[[], Shapes]] = {"1": lambda: [(8, 8)], "10": lambda: [(8, 8)] * 10}
"""Buckets of so many matrices that there is nothing to compute: what is left is the overhead."""
