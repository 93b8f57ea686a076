"""The benches that ``make bench`` runs, and which options make each of them short. One line each."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.stamp import read_lines


@dataclasses.dataclass(frozen=True)
class Bench:
    """A module that measures something, and says how it is shown.

    ``python -m MODULE --out FOLDER`` writes ``FOLDER/NAME.jsonl`` (`bench.stamp.write_lines`); exit code 2, after one
    line that says why, means that it cannot run on this machine. The module, or its ``__main__``, has a function
    ``tables(records)`` that gives tables in markdown by the marks that they have in ``docs``; and it may have
    ``pictures(records, folder)``, which draws into that folder.

    Args:
        name: of the bench.
        module: to be run.
        short: options with which it takes a minute or two.
    """

    name: str
    module: str
    short: Sequence[str] = ()

    def records(self, folder: Path) -> list[dict[str, Any]]:
        """What its last run into ``folder`` wrote; nothing if there was none."""
        path = folder / f"{self.name}.jsonl"
        return read_lines(path) if path.exists() else []

    def tables(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
        """Its tables by their marks."""
        return self._home().tables(records)

    def pictures(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Draw its pictures, if it has any."""
        getattr(self._home(), "pictures", lambda *_: None)(records, folder)

    def _home(self) -> Any:
        spec = importlib.util.find_spec(self.module)
        package = spec is not None and spec.submodule_search_locations is not None
        return importlib.import_module(f"{self.module}.__main__" if package else self.module)


BENCHES = (
    Bench("lab", "bench.lab", ("--rounds", "3", "--workloads", "matrices", "dalle", "--layouts", "replicated")),
    Bench("planning", "bench.planning", ("--probe", "--worlds", "8", "64", "1024", "16384")),
    Bench("compression", "bench.compression", ("--models", "resnet50", "dalle-demo", "--ranks", "4", "--rounds", "3")),
    Bench("sharding", "bench.sharding", ("--rounds", "3", "--limits", "0", "1000", "100")),
    Bench("robustness", "bench.robustness", ("--repeats", "1", "--timeout", "10")),
    Bench("stability", "bench.stability", ("--steps", "1000")),
    Bench("low_rank_error", "bench.low_rank_error", ("--ranks", "4", "32")),
    Bench("memory", "bench.memory"),
    Bench("overlap", "bench.overlap"),
    Bench("optimizer", "bench.optimizer", ("--rounds", "10")),
    Bench("dalle_speed", "bench.dalle_speed", ("--sizes", "demo", "--rounds", "8")),
    Bench(
        "quality",
        "bench.quality",
        (
            "--seeds",
            "0",
            "--precisions",
            "fp32",
            "--ranks",
            "4",
            "--late",
            "--alternate",
            "--halved",
            "8",
            "--theirs",
            "4",
            "--times",
            "5",
        ),
    ),
    Bench("gpu", "bench.gpu", ("--quick",)),
    Bench("dalle_reducers", "bench.dalle_reducers", ("--steps", "200")),
    Bench("tokenizers", "bench.tokenizers", ("--bottlenecks", "vq", "fsq", "--steps-1", "150", "--steps-2", "0")),
)
