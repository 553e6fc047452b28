"""What the board says to pictures that its model cannot know: how many of them are "none of these" with `--unknown auto`.

Usage: strange.py --vedge VEDGE --run VEDGE_RUN --work FOLDER MODEL.onnx…

Converts each classifier of Fashion-MNIST to INT8 with the shipped calibration pictures, makes pictures of many kinds, lets the
program classify them, and prints a table for tests/records/unknown.md: the share of each kind that is refused, in all and (by
energy, by confidence, by looks) alone, and that of the shipped test pictures, which should not be. Photographs come from VEDGE_SHARED, and are left out without it.
"""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FASHION = Path(__file__).resolve().parents[2] / "models" / "fashion"
COUNT = 200


def kinds():
    """Pictures of each kind, as arrays of grey or RGB."""
    random = np.random.default_rng(1)
    test = [Image.open(path).convert("L") for path in sorted((FASHION / "test").glob("*/*.png"))]
    yield "test pictures", test
    yield "noise, 28x28", [random.uniform(0, 255, (28, 28)) for _ in range(COUNT)]
    yield "noise, 640x480 RGB", [random.uniform(0, 255, (480, 640, 3)) for _ in range(COUNT // 10)]
    yield "noise of a dark sensor, 64x64", [random.normal(20, 10, (64, 64)) for _ in range(COUNT)]
    yield "uniform grey", [np.full((28, 28), value) for value in range(256)]
    coarse = [Image.fromarray(random.uniform(0, 255, (5, 5)).astype(np.float32)) for _ in range(COUNT)]
    yield "clouds", [cloud.resize((28, 28), Image.Resampling.BILINEAR) for cloud in coarse]
    ramps = random.uniform(0, 128, (COUNT, 4))
    yield "gradients", [np.add.outer(np.linspace(a, b, 64), np.linspace(c, d, 64)) for a, b, c, d in ramps]
    waves = zip(random.uniform(0, np.pi, COUNT), random.uniform(0.1, 2, COUNT))
    grid = np.arange(64)
    yield "stripes, turned", [127 + 127 * np.sin(f * np.add.outer(grid * np.cos(t), grid * np.sin(t))) for t, f in waves]
    yield "chessboards", [255 * (np.add.outer(grid // n, grid // n) % 2) for n in range(1, 33)]
    yield "digits, white on black", [digit(n, random) for n in range(COUNT)]
    if shared := os.environ.get("VEDGE_SHARED"):
        paths = [p for folder in sorted(Path(shared, "data/imagenette/val").iterdir()) for p in sorted(folder.iterdir())[:20]]
        photos = [Image.open(path).convert("RGB") for path in paths]
        yield "photographs", photos
        yield "photographs, left half black", [half_black(np.asarray(photo)) for photo in photos]
    arrays = [np.asarray(picture) for picture in test]
    yield "test pictures, negative", [255 - array for array in arrays]
    yield "test pictures, pixels shuffled", [random.permutation(array.ravel()).reshape(array.shape) for array in arrays]
    yield "test pictures, left half black", [half_black(array) for array in arrays]
    yield "test pictures, turned by 90°", [np.rot90(array) for array in arrays]


def digit(number, random):
    """A digit as MNIST has them: white on black, a little turned and blurred."""
    picture = Image.new("L", (28, 28))
    place = tuple(14 + random.integers(-2, 3, 2))
    ImageDraw.Draw(picture).text(place, str(number % 10), fill=255, font=ImageFont.load_default(22), anchor="mm")
    return picture.rotate(random.uniform(-15, 15)).filter(ImageFilter.GaussianBlur(0.6))


def half_black(array):
    array = array.copy()
    array[:, : array.shape[1] // 2] = 0
    return array


def convert(args, model):
    """The model in INT8, and its card's limits."""
    out = args.work / f"{model.stem}.onnx"
    line = [args.vedge, "convert", model, "-o", out, "--precision", "int8", "--no-cache"]
    line += ["--preprocess", FASHION.parent / "fashion.json", "--calib", FASHION / "calibration"]
    subprocess.run(line, check=True, capture_output=True)
    shown = json.loads(subprocess.run([args.vedge, "inspect", out, "--json"], check=True, capture_output=True).stdout)
    return out, shown["card"]["certainty"]["limits"]


def answers(args, model, folder):
    line = [args.run, model, folder, "--unknown", "auto", "--top", "1"]
    done = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in done.splitlines()]


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--vedge", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("models", type=Path, nargs="+")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    folders = {}
    for number, (kind, pictures) in enumerate(kinds()):
        folders[kind] = args.work / str(number)
        folders[kind].mkdir(parents=True)
        for n, picture in enumerate(pictures):
            array = np.clip(np.asarray(picture), 0, 255).astype(np.uint8)
            Image.fromarray(array).save(folders[kind] / f"{n:03}.png")

    found = {kind: [] for kind in folders}
    for model in args.models:
        file, limits = convert(args, model)
        for kind, folder in folders.items():
            lines = answers(args, file, folder)
            share = lambda test: f"{100 * sum(map(test, lines)) / len(lines):.1f}"
            every = share(lambda a: a["unknown"])
            energy, unsure = share(lambda a: a["energy"] > limits["energy"]), share(lambda a: a["top"][0]["p"] < limits["confidence"])
            looks = share(lambda a: a["distance"] > limits["looks"]["distance"])
            found[kind].append(f"**{every}** ({energy}, {unsure}, {looks})")
    print("| refused, % |" + "".join(f" {model.stem} |" for model in args.models))
    print("|---|" + "---|" * len(args.models))
    for kind, cells in found.items():
        print(f"| {kind} |" + "".join(f" {cell} |" for cell in cells))


if __name__ == "__main__":
    main()
