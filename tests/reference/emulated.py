"""The board binary's numbers under qemu-user against this machine's.

Usage: emulated.py --here VEDGE_RUN --board VEDGE_RUN --cpus CPU… --models MODEL… [--emulator "qemu-arm-static -L DIR"]

Sums of integers are the same everywhere; the float rest is not: attention of these files is float on ARM and in 16-bit
integers on x86-64, and fused multiply-add rounds once. A value that so falls on the other side of a rounding step moves by the whole step:
mobilevit_nano's logits by the plain and the AVX2 kernels of one machine have a cosine of 0.9998, deit_nano's one of 0.99999. So:
the same answer, and a cosine similarity of the logits of at least MIN_COSINE, for shipped test pictures on every emulated core.
"""

import argparse
from pathlib import Path

import numpy as np
from compare import cosine
from engines import Infer
from PIL import Image

PICTURES = Path(__file__).resolve().parents[2] / "models" / "fashion" / "test"
MIN_COSINE = 0.9995


def pictures():
    """The first test picture of each class: [10, 3, 64, 64], as models/fashion.json says."""
    tensors = []
    for folder in sorted(PICTURES.iterdir()):
        picture = Image.open(sorted(folder.iterdir())[0]).resize((64, 64), Image.BILINEAR)
        x = (np.asarray(picture, np.float32) / 255 - 0.5) / 0.25
        tensors.append(np.stack([x, x, x]))
    return np.stack(tensors).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("here", "board"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--emulator", default="qemu-aarch64-static")
    for name in ("cpus", "models"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    args = parser.parse_args()

    batch, failures = pictures(), 0
    for model in args.models:
        here = Infer(args.here, model, batch).result()
        for cpu in args.cpus:
            there = Infer([*args.emulator.split(), "-cpu", cpu, args.board], model, batch).result()
            lowest, same = cosine(here, there).min(), int((here.argmax(1) == there.argmax(1)).sum())
            good = lowest >= MIN_COSINE and same == len(batch)
            failures += not good
            print(
                f"{'ok    ' if good else 'FAILED'} {Path(model).name} on {cpu}: same answer for {same} of {len(batch)} pictures, "
                f"lowest cosine {lowest:.7f}, largest difference {np.abs(here - there).max():.2e}",
                flush=True,
            )
    if failures:
        raise SystemExit(f"{failures} runs under qemu-user differ from this machine")


if __name__ == "__main__":
    main()
