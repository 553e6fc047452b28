#!/usr/bin/env python3
"""A camera's frame to the model's tensor: vedge beside the chains of Pillow and OpenCV that do the same.

Usage: preprocess.py [--record FILE]     Needs numpy, pillow and opencv-python-headless.

640x480 to 224x224: shorter edge to 248 (crop 0.9, bicubic), centre, normalized, float32 planes. Each on one thread, in the
same run; medians. OpenCV's bicubic filter does not antialias, so its chain is given INTER_AREA, which does.
"""
import argparse, json, platform, subprocess, time
import cv2
import numpy as np
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
RUNS = 200
WIDTH, HEIGHT = 640, 480


def normalized(rgb):
    return np.ascontiguousarray(((rgb.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None])


def pillow(rgb):
    """torchvision's and timm's way: resize, crop, to tensor."""
    small = Image.fromarray(rgb).resize((330, 248), Image.BICUBIC)
    return normalized(np.asarray(small.crop((53, 12, 277, 236))))


def opencv(rgb):
    small = cv2.resize(rgb, (330, 248), interpolation=cv2.INTER_AREA)[12:236, 53:277]
    return normalized(small)


def median(function):
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[RUNS // 2] * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--record")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    command = ["cargo", "bench", "--quiet", "--profile", "release", "-p", "vedge-runtime", "--bench", "preprocess"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    ours = {r["format"]: r["us"] for r in map(json.loads, (l for l in lines if l.startswith("{")))}
    noise = np.random.default_rng(1)
    frames = {"YUYV": (HEIGHT, WIDTH, 2), "NV12": (HEIGHT * 3 // 2, WIDTH), "RGB3": (HEIGHT, WIDTH, 3), "GREY": (HEIGHT, WIDTH)}
    convert = {
        "YUYV": lambda f: cv2.cvtColor(f, cv2.COLOR_YUV2RGB_YUYV),
        "NV12": lambda f: cv2.cvtColor(f, cv2.COLOR_YUV2RGB_NV12),
        "RGB3": lambda f: f,
        "GREY": lambda f: cv2.cvtColor(f, cv2.COLOR_GRAY2RGB),
    }
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith(("model name", "Model"))), platform.machine())
    rows = [f"| {'format':6} | vedge | Pillow | OpenCV | to Pillow | to OpenCV |", "|---|---|---|---|---|---|"]
    for name, shape in frames.items():
        frame = noise.integers(0, 256, shape, np.uint8)
        p, o = median(lambda: pillow(convert[name](frame))), median(lambda: opencv(convert[name](frame)))
        v = ours[name]
        rows.append(f"| {name:6} | {v:.0f} µs | {p:.0f} µs | {o:.0f} µs | {v / p:.2f} | {v / o:.2f} |")
    text = f"{cpu}, one thread; Pillow {Image.__version__}, OpenCV {cv2.__version__}\n\n" + "\n".join(rows) + "\n"
    print(text)
    if args.record:
        with open(args.record, "a") as out:
            out.write(f"\n## {time.strftime('%Y-%m-%d')}\n\n{text}")


if __name__ == "__main__":
    main()
