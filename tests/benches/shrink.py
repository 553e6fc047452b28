#!/usr/bin/env python3
"""Shrunk models beside plain INT8 and ONNX Runtime's float: a table for tests/records/shrink.md.

shrink.py --vedge VEDGE --run VEDGE_RUN --source MODEL --preprocess PRESET|FILE --calib FOLDER --data FOLDER --work FOLDER
          [--calib-count N] [--rounds N] NAME=OPTIONS ...

Each NAME=OPTIONS is a conversion with these options of `vedge convert`, such as 'merged=--merge-tokens 18'; plain INT8 is
made with --preset cpu as all of them are. Accuracy is measured on all pictures of --data, times on one thread in turns with
the others. Models in --work that are there already are used as they are.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import time
from pathlib import Path


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


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "run", "source", "calib", "data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--preprocess", required=True)
    parser.add_argument("--calib-count", default=128, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    args.vedge, args.run = args.vedge.resolve(), args.run.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, options in [("plain INT8", ""), *(m.split("=", 1) for m in args.models)]:
        path = args.work / f"{args.source.stem}.{name.replace(' ', '_')}.onnx"
        if not path.exists():
            calibration = ["--calib", args.calib, "--calib-count", args.calib_count]
            command(args.vedge, "convert", args.source, "-o", path, "--preset", "cpu", "--preprocess", args.preprocess, *calibration, *shlex.split(options))
        files[name] = (path, options)
    float_once, version = ort_float(args.source)
    times = {name: [] for name in files} | {"float": []}
    for _ in range(args.rounds):
        times["float"] += [float_once() for _ in range(6)][1:]
        for name, (path, _) in files.items():
            times[name].append(json.loads(command(args.run, "bench", path, "--threads", 1, "--warmup", 3, "--runs", 20, "--json"))["median_ms"])
    median = {name: statistics.median(t) for name, t in times.items()}
    paths = [path for path, _ in files.values()]
    scores = json.loads(command(args.vedge, "eval", args.source, *paths, "--data", args.data, "--preprocess", args.preprocess, "--json"))
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
