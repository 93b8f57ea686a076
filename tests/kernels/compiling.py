"""What a GPU would be given, without one: kernels are compiled for it, to the last instruction, and not run.

The interpreter that tests run kernels through takes programs that a GPU's compiler refuses. So each module of tests here
has a function ``launches()`` that calls what launches kernels as users would; a process of its own calls it with a
driver that only says what the machine would be.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CAPABILITY = 90
"""Of an H100 or H200; 80 would be an A100's."""


class Compiled(NamedTuple):
    """One kernel, as specialised for one launch.

    Args:
        name: of the function.
        shared: bytes of shared memory a block.
        warps: of a block.
        registers: a thread.
        spilled: bytes of a thread's registers that go to memory and come back.
    """

    name: str
    shared: int
    warps: int
    registers: int
    spilled: int


def compiled(module: str, capability: int = CAPABILITY) -> list[Compiled]:
    """Compile all kernels that ``module.launches()`` launches, in a process of its own.

    Raises:
        AssertionError: a kernel cannot be compiled; with the compiler's words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", module, str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr[-5000:]
    return [Compiled(*json.loads(line)) for line in run.stdout.splitlines() if line.startswith("[")]


def main(module: str, capability: int) -> None:
    """Print what was compiled, a line of JSON each."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Machine:
        """The driver of a GPU that is not there."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Machine())
    seen: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers, spilled = _resources(kernel.asm["cubin"], Path(triton.__file__).parent)
        metadata = kernel.metadata
        seen[kernel.hash] = Compiled(metadata.name, metadata.shared, metadata.num_warps, registers, spilled)
        return kernel

    JITFunction.run = compile_only
    importlib.import_module(module).launches()
    for each in seen.values():
        print(json.dumps(each))


def _resources(cubin: bytes, triton: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory in their place."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(triton / "backends/nvidia/bin/cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
