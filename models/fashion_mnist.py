"""Reads Fashion-MNIST from the idx files that Debian's package `dataset-fashion-mnist` installs.

The folder is `FASHION_MNIST` in the environment, else where the package puts it.
"""

import gzip
import os
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
PARTS = {"train": "train", "test": "t10k"}


def _idx(path):
    """Array of unsigned bytes in an idx file: 2 zero bytes, type 8, rank, big-endian sizes, data."""
    data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: not an idx file of unsigned bytes")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _find(name):
    for path in (FOLDER / name, FOLDER / f"{name}.gz"):
        if path.exists():
            return path
    raise SystemExit(f"{FOLDER / name}[.gz] is missing.\nhint: apt-get install dataset-fashion-mnist, or set FASHION_MNIST")


def load(part):
    """Pictures `[n, 28, 28]` and class indices `[n]`, unsigned bytes, of part `train` (60,000) or `test` (10,000)."""
    prefix = PARTS[part]
    return _idx(_find(f"{prefix}-images-idx3-ubyte")), _idx(_find(f"{prefix}-labels-idx1-ubyte"))
