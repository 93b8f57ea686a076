"""Draw the pictures of docs/concepts.

python -m bench.concepts                       # half a minute
python -m bench.concepts --out runs/concepts
"""

import argparse
from pathlib import Path

import torch

from bench.concepts.pictures import DRAWN, draw

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/concepts"), help="folder for the pictures")
    parser.add_argument("only", nargs="*", help=f"which of {', '.join(DRAWN)}; all if none is named")
    chosen = parser.parse_args()
    if unknown := set(chosen.only) - set(DRAWN):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(DRAWN)}")
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.only or DRAWN:
        draw(name, DRAWN[name][0](), chosen.out / f"{name}.png")
        print(chosen.out / f"{name}.png")
