#!/usr/bin/env python3
"""How old an answer is beyond the capture of its frame and the model: at 30 frames a second.

Usage: freshness.py --run VEDGE_RUN [--frames 300] [--threads N] MODEL.onnx…

Runs the program on `synthetic://640x480?fps=30` and reads its lines. Added is latency (from the frame's timestamp to the answer)
minus capture minus infer: preprocessing, and every wait between the threads. Prints a table for tests/records/freshness.md and
fails where p90 of a model is above 5 ms.
"""

import argparse
import datetime
import json
import platform
import subprocess
from pathlib import Path

WARM = 30
MOST = 5.0


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("models", type=Path, nargs="+")
    args = parser.parse_args()
    print(f"Measured {datetime.date.today()}, {platform.machine()}, {args.threads} thread(s), {args.frames} frames.\n")
    print("| model | infer p50 | infer p90 | preprocess p50 | added p50 | added p90 | added p99 | dropped |")
    print("|---|---|---|---|---|---|---|---|")
    slow = []
    for model in args.models:
        command = [args.run, model, "synthetic://640x480?fps=30", "--max-frames", str(args.frames + WARM)]
        done = subprocess.run([*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()][WARM:]
        assert len(lines) == args.frames, f"{len(lines)} answers"
        ms = [line["ms"] for line in lines]
        added = [m["latency"] - m["capture"] - m["infer"] for m in ms]
        at = lambda values, share: sorted(values)[max(0, -(-len(values) * share // 100) - 1)]
        infer, prepare = [m["infer"] for m in ms], [m["preprocess"] for m in ms]
        row = [at(infer, 50), at(infer, 90), at(prepare, 50), at(added, 50), at(added, 90), at(added, 99)]
        cells = " | ".join(f"{v:.2f} ms" for v in row)
        print(f"| {model.name} | {cells} | {sum(line['dropped'] for line in lines)} |", flush=True)
        if at(added, 90) > MOST:
            slow.append(model.name)
    assert not slow, f"more than {MOST} ms are added at p90: {slow}"


if __name__ == "__main__":
    main()
