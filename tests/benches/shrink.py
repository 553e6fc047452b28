#!/usr/bin/env python3
"""Shrunk models beside plain INT8 and ONNX Runtime's float: a table for tests/records/shrink.md.

shrink.py --vedge VEDGE --run VEDGE_RUN --work FOLDER [--rounds N] --judged SHARED
shrink.py --vedge VEDGE --run VEDGE_RUN --work FOLDER [--rounds N] --source MODEL --preprocess PRESET|FILE --calib FOLDER
          --data FOLDER [--calib-count N] NAME=OPTIONS ...

With --judged the rows that the project judges itself by: ViT-S/14 on Imagenette (SHARED/models, SHARED/data), the nano models on
Fashion-MNIST (Debian's dataset-fashion-mnist; 2,000 of 3,000 training pictures calibrate, the 10,000 test pictures are asked).

Each NAME=OPTIONS is a conversion with these options of `vedge convert`, such as 'merged=--merge-tokens 18'; plain INT8 is
made with --preset cpu as all of them are. Accuracy is measured on all pictures of --data, times on one thread in turns with
the others. Models in --work that are there already are used as they are.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(*words):
    return subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True).stdout


def ort_float(source):
    """A function that runs the float model once and returns milliseconds."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    shape = [d if isinstance(d, int) else 1 for d in session.get_inputs()[0].shape]
    feed = {session.get_inputs()[0].name: np.random.default_rng(1).standard_normal(shape, dtype=np.float32)}

    def once():
        start = time.perf_counter()
        session.run(None, feed)
        return 1e3 * (time.perf_counter() - start)

    return once, ort.__version__


JUDGED = {
    "vits14_imagenette": ["182 px, 8 merged=--size 182 --merge-tokens 8"],
    "deit_nano": ["6 merged, MLP=--merge-tokens 6 --prune-mlp 30"],
    "swin_nano": ["MLP and heads=--prune-mlp 80 --prune-heads 30"],
}


def fashion(folder, part, count):
    """Class folders of Fashion-MNIST with at most `count` pictures each."""
    sys.path.insert(0, str(ROOT / "models"))
    from fashion_mnist import NAMES, load
    from PIL import Image

    if not folder.exists():
        pictures, classes = load(part)
        for index, name in enumerate(NAMES):
            out = folder / f"{index}_{name}"
            out.mkdir(parents=True)
            for position in (classes == index).nonzero()[0][:count]:
                Image.fromarray(pictures[position]).save(out / f"{position:05}.png")
    return folder


def judged(args):
    """One table a model."""
    for name, models in JUDGED.items():
        print(f"\n## {name}\n", flush=True)
        source = args.judged / "models" / f"{name}.onnx"
        if name.startswith("vits14"):
            data = args.judged / "data" / "imagenette"
            table(args, source, "imagenet", data / "calib", 128, data / "val", models)
        else:
            calib = fashion(args.work / "fashion-calibration", "train", 300)
            data = fashion(args.work / "fashion-test", "test", 1000)
            table(args, source, ROOT / "models/fashion.json", calib, 2000, data, models)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "run", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("source", "calib", "data", "judged"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--preprocess")
    parser.add_argument("--calib-count", default=128, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    args.vedge, args.run = args.vedge.resolve(), args.run.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.judged:
        judged(args)
    elif all([args.source, args.preprocess, args.calib, args.data, args.models]):
        table(args, args.source, args.preprocess, args.calib, args.calib_count, args.data, args.models)
    else:
        parser.error("--judged, or --source, --preprocess, --calib, --data and at least one NAME=OPTIONS")


def table(args, source, preprocess, calib, calib_count, data, models):
    files = {}
    for name, options in [("plain INT8", ""), *(m.split("=", 1) for m in models)]:
        path = args.work / f"{source.stem}.{re.sub('[^A-Za-z0-9]+', '_', name)}.onnx"
        if not path.exists():
            calibration = ["--calib", calib, "--calib-count", calib_count]
            command(args.vedge, "convert", source, "-o", path, "--preset", "cpu", "--preprocess", preprocess, *calibration, *shlex.split(options))
        files[name] = (path, options)
    float_once, version = ort_float(source)
    times = {name: [] for name in files} | {"float": []}
    float_once()
    runs = 20 if float_once() > 20 else 200
    for _ in range(args.rounds):
        times["float"] += [float_once() for _ in range(6)][1:]
        for name, (path, _) in files.items():
            times[name].append(json.loads(command(args.run, "bench", path, "--threads", 1, "--warmup", 3, "--runs", runs, "--json"))["median_ms"])
    median = {name: statistics.median(t) for name, t in times.items()}
    paths = [path for path, _ in files.values()]
    scores = json.loads(command(args.vedge, "eval", source, *paths, "--data", data, "--preprocess", preprocess, "--json"))
    scores = scores["models"] if isinstance(scores, dict) else scores
    whole = scores[0]
    print(f"{whole['pictures']} pictures, float top-1 {100 * whole['top1']:.2f} %; ONNX Runtime {version}, one thread, {args.rounds} rounds in turns\n")
    print("| | options | median ms | faster than plain INT8 | than ONNX Runtime float | top-1 | against float, points | agreement |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| ONNX Runtime float | | {median['float']:.2f} | | 1.00 | {100 * whole['top1']:.2f} % | | |")
    for (name, (_, options)), s in zip(files.items(), scores[1:]):
        print(
            f"| {name} | {f'`{options}`' if options else ''} | {median[name]:.2f} | {median['plain INT8'] / median[name]:.2f} "
            f"| {median['float'] / median[name]:.2f} | {100 * s['top1']:.2f} % | {100 * (s['top1'] - whole['top1']):+.2f} | {100 * s['agreement']:.2f} % |"
        )


if __name__ == "__main__":
    main()
