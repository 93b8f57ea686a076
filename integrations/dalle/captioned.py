"""What the stages that learn from captioned pictures tell the trainer alike."""

from collections.abc import Sequence

from torch import Tensor, nn

from .codes import Codec
from .context import Context, Source
from .schedules import StageSettings
from .text import Tokenizer


class CaptionedStage:
    """The beginning of a `trainer.Stage`; ``settings.averaging`` is a fraction of the steps so far.

    Args:
        source: captions with pictures.
        dvae: tokenises pictures; it is not changed.
        tokenizer: tokenises captions.
        settings: how the stage is trained.
        context: its surroundings.
    """

    grad_scaler = None

    def __init__(
        self, source: Source, dvae: Codec, tokenizer: Tokenizer, settings: StageSettings, context: Context
    ) -> None:
        self.settings = settings
        self._source, self._dvae, self._tokenizer, self._context = source, dvae, tokenizer, context

    def by_columns(self) -> Sequence[nn.Parameter]:
        """No matrix."""
        return []

    def weight_of_last(self, taken: int) -> float:
        """The weight of the last weights in the averaged ones, whose window grows with the steps taken before."""
        averaging = self.settings.averaging
        return min(1.0, 1 / (1 + averaging * taken)) if averaging else 1.0

    def values(self, step: int) -> dict[str, float]:
        """The learning rate."""
        return {"learning_rate": self.settings.learning_rate_at(step)}

    def look(self, number: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Nothing that the figures of every step do not show."""
        return {}, {}
