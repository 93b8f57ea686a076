"""Does a plan predict what a step takes, and what does it say of clusters that nobody can try here?

    python -m bench.planning                        # simulation: three minutes; and what there is to validate against
    python -m bench.planning --probe                # times links and processors first: a minute more; Linux, as root
    python -m bench.planning --probe --worlds       # no simulation: that of the last run is kept
    python -m bench.planning --worlds 8 128 2048    # fewer points of the curves

The simulation predicts DALL-E's sizes on 8 to 16,384 ranks. The validation takes the steps that `bench.lab` has
measured, and predicts each from rates that `--probe` has timed in the same lab, and from the time of forward and
backward. A prediction passes if it is within 15 % of the median, or within the range of the measured steps. Writes
JSON lines.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lab.hosts import check, refusing
from bench.planning.pictures import draw
from bench.planning.probing import probed
from bench.planning.simulation import WORLDS, simulated
from bench.planning.validation import validated, validation_table
from bench.stamp import markdown, write_lines


def main() -> None:
    """Read the command line, run, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--worlds", type=int, nargs="*", default=WORLDS, metavar="N", help="ranks to simulate")
    parser.add_argument("--probe", action="store_true", help="time links and processors in the lab")
    parser.add_argument(
        "--limits", type=int, nargs="+", default=[0, 1000, 100], metavar="MBIT", help="of links, 0: none"
    )
    chosen = parser.parse_args()
    if chosen.probe:
        check()
    path, lab = chosen.out / "planning.jsonl", chosen.out / "lab.jsonl"
    kept = _read(path)
    probes = probed(chosen.limits) if chosen.probe else [r for r in kept if r["kind"] in ("link", "hook", "processor")]
    curves = simulated(worlds=chosen.worlds) if chosen.worlds else [r for r in kept if r["kind"] == "simulated"]
    records = [*curves, *probes, *validated(_read(lab), probes)]
    write_lines(path, "planning", records)
    pictures(records, chosen.out)
    for name, text in tables(records).items():
        print(f"\n{name}\n\n{text}")


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Tables in markdown, by their marks in the documentation."""
    curves = any(r["kind"] == "simulated" for r in records)
    found = {"planning-paper": _paper(records), "planning-curves": _curves(records)} if curves else {}
    checked = [r for r in records if r["kind"] == "validated"]
    return found | ({"planning-validation": validation_table(checked)} if checked else {})


def pictures(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw the curves, if they have been simulated."""
    if curves := [r for r in records if r["kind"] == "simulated"]:
        draw(folder / "planning.png", curves)


def _paper(records: Sequence[Mapping[str, Any]]) -> str:
    saved = {r["preset"]: r for r in records if r["kind"] == "simulated" and r["matrices_saved"] is not None}
    told = {"paper-2.8b": "83 %", "paper-5.6b": "85 %", "paper-12b": "86 %"}
    rows = [
        [preset, f"{r['parameters'] / 1e9:.2f}", f"{100 * r['matrices_saved']:.1f} %", told[preset]]
        for preset, r in saved.items()
    ]
    return markdown(["size", "billion parameters", "saved of the matrices", "in the paper"], rows)


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """At the number of ranks that is nearest to the paper's 1024."""
    simulated = [r for r in records if r["kind"] == "simulated"]
    world = min((r["world"] for r in simulated), key=lambda world: abs(world - 1024), default=0)
    rows = [
        [
            r["preset"],
            f"{r['gigabits']} Gbit/s",
            f"{r['compute_seconds']:.2f}",
            f"{r['plain_seconds']:.2f}",
            f"{r['ranked_seconds']:.2f}",
            r["plan"],
        ]
        for r in simulated
        if r["world"] == world and r["wire"] == "float16"
    ]
    head = ["size", f"link, {world} ranks", "computing, s", "plain DDP, s", "PowerSGD, s", "the plan"]
    return markdown(head, rows)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    refusing(main)
