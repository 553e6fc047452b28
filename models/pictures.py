"""Writes the shipped pictures: `fashion/calibration` (training set) and `fashion/test` (test set).

Usage: python3 models/pictures.py        needs numpy, pillow and Debian's package dataset-fashion-mnist

Each folder gets the first 20 pictures of each of the ten classes, 28×28 grey PNGs in `<class index>_<name>/`, so that
the sorted folder names are the class indices. A picture's file name is its position in the set.
"""

import shutil
from pathlib import Path

from fashion_mnist import NAMES, load
from PIL import Image

PER_CLASS = 20


def main():
    base = Path(__file__).parent / "fashion"
    for folder, part in (("calibration", "train"), ("test", "test")):
        pictures, classes = load(part)
        shutil.rmtree(base / folder, ignore_errors=True)
        for index, name in enumerate(NAMES):
            out = base / folder / f"{index}_{name}"
            out.mkdir(parents=True)
            for position in (classes == index).nonzero()[0][:PER_CLASS]:
                Image.fromarray(pictures[position]).save(out / f"{position:05}.png", optimize=True)


if __name__ == "__main__":
    main()
