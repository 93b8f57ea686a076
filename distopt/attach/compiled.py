"""Meeting the gradients of a DDP model whose communication is to be compiled (``optimize_ddp = "python_reducer"``).

In this mode DDP has no buckets. It calls the hook for every parameter on its own, as soon as its gradient is there, and
does not wait for anything: a step is reduced when the backward pass is over.
"""

# DDP compares the hook's annotations with objects: this module cannot defer their evaluation.

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from distopt.attach.engine import Engine
from distopt.attach.gradients import GradientsAttachment
from distopt.errors import RegistrationError


class CompiledDDPAttachment(GradientsAttachment):
    """The communication hook of one DDP model that was wrapped under ``optimize_ddp = "python_reducer"``.

    Args:
        engine: carries out the steps.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._backward_pass = -1
        self._note = cast(Callable[[], None], torch.compiler.disable(self._note_gradient))

    def reduce(self) -> bool:
        """See `Attachment.reduce`."""
        raise RegistrationError("DDP's backward pass reduces the gradients: there is nothing to call")

    def hook(
        self,
        state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> Future[Tensor]:
        """Take note that a gradient is there. DDP gives a pair of gradient and parameter, and ignores the answer."""
        self._note()
        return cast(Future[Tensor], None)

    def _note_gradient(self) -> None:
        if torch._dynamo.compiled_autograd.in_compiled_autograd_region:  # pyright: ignore
            raise RegistrationError(
                "compiled autograd does not tell when a backward pass is over, and reducers need to know: set "
                "torch._dynamo.config.compiled_autograd = False"
            )
        # The engine's number of the pass, not a flag: a pass that raised would leave it up.
        current = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if current != self._backward_pass:
            self._backward_pass = current
            torch.autograd.Variable._execution_engine.queue_callback(super().reduce)  # pyright: ignore
