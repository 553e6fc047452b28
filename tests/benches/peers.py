"""INT8 of vedge beside that of other tools: same float model, same calibration pictures, same test tensors.

Usage: peers.py --vedge VEDGE --run VEDGE_RUN --out FOLDER [--models NAME,...] [--limit N] [--calib N]

Models: deit_nano, mobilevit_nano (shipped), swin_nano, vits14_imagenette (shared data, VEDGE_SHARED), and files that `others.py`
made, by path: FOLDER/NAME.onnx with NAME.json beside it, on Fashion-MNIST or, where the name ends in _photo, Imagenette. Peers: ONNX Runtime
static (min-max; percentile, its default) and dynamic, each with full-range and 7-bit weights, and NNCF (`nncf.quantize` on ONNX, transformer) where it is installed: `pip install nncf`, in an environment of its own. Like
stands beside like: ONNX Runtime's dynamic mode leaves convolutions in float, so that it is compared with our `cpu` file that does
the same (`--keep-float Conv`), and the same with its convolutions in integers, too, with our plain `cpu` file. Peers run in
ONNX Runtime with its default optimizations, as their users run them; ours in vedge-run. Our files are also run in ONNX Runtime
and, where it is installed, in OpenVINO, for their top-1 there. Writes FOLDER/peers.json and FOLDER/peers.md.
"""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "reference"), str(ROOT / "models")]
import fashion_mnist  # noqa: E402
import parity  # noqa: E402
from compare import agreement, sqnr  # noqa: E402
from foreign import Reader  # noqa: E402
from engines import Infer, command, run_rows, session  # noqa: E402

LAYERS = ["Conv", "MatMul", "Gemm"]
# Our files: title, what is compared with it, and how it is made.
OURS = [
    ("portable", "static", ["--preset", "portable"]),
    ("cpu", "dynamic", ["--preset", "cpu"]),
    ("cpu, convolutions in float", "dynamic, convolutions in float", ["--preset", "cpu", "--keep-float", "Conv"]),
]


def read_fashion(path):
    """A picture as a batch of one."""
    return parity.fashion_tensor(Image.open(path).convert("L"))[None]


def reader(how, size):
    """What reads a picture file as a batch of one, as a preprocessing file says: squashed, bilinear."""
    mean, std = (np.float32(how[k])[:, None, None] for k in ("mean", "std"))

    def read(path):
        picture = Image.open(path).convert("RGB").resize((size, size), Image.BILINEAR)
        return ((np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255) - mean) / std)[None]

    return read


def stranger(args, source):
    """Pictures, reader and chunks of a model that is no part of this project."""
    how = json.loads(source.with_suffix(".json").read_text())
    read = reader(how, onnx.load(source).graph.input[0].type.tensor_type.shape.dim[2].dim_value)
    if source.stem.endswith("_photo"):
        data = Path(os.environ["VEDGE_SHARED"]) / "data" / "imagenette"
        files = sorted((data / "val").glob("*/*"))[: args.limit]
        whole = [(read(f), int(f.parent.name.split("_")[0])) for f in files]
        return data / "calib", read, lambda: iter([(np.concatenate([x for x, _ in whole]), np.array([c for _, c in whole]))])
    pictures, classes = fashion_mnist.load("test")

    def chunks():
        for i in range(0, min(args.limit, len(pictures)), 500):
            yield np.concatenate([read(as_file(p)) for p in pictures[i : i + 500]]), classes[i : i + 500]

    return ROOT / "models/fashion/calibration", read, chunks


def as_file(pixels):
    """A grey picture as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file


def calibration(folder, count, read):
    """`count` tensors, spread evenly over the classes."""
    classes = [sorted(c.glob("*.*")) for c in sorted(folder.iterdir()) if c.is_dir()]
    each = -(-count // len(classes))
    picked = [files[i * len(files) // each] for i in range(each) for files in classes if i < len(files)]
    return [read(path) for path in picked[:count]]


def peers(source, tensors, out):
    """Name, kind and file of every peer's INT8 model; a peer that fails gives its error instead of a file."""
    name = onnx.load(source).graph.input[0].name

    def static(method, reduce_range):
        def make(path):
            quantize_static(
                str(source), str(path), Reader(name, tensors),
                quant_format=QuantFormat.QDQ, op_types_to_quantize=LAYERS, per_channel=True, reduce_range=reduce_range,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method,
                extra_options={"CalibMaxIntermediateOutputs": 16} if method == CalibrationMethod.Percentile else {},
            )  # fmt: skip

        return make

    def dynamic(reduce_range, layers=("MatMul", "Gemm"), per_channel=True, weights=QuantType.QInt8):
        return lambda path: quantize_dynamic(
            str(source), str(path), op_types_to_quantize=list(layers), per_channel=per_channel, reduce_range=reduce_range, weight_type=weights
        )

    def nncf_model(path):
        import nncf

        data = nncf.Dataset(tensors, lambda t: {name: t})
        done = nncf.quantize(onnx.load(source), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(tensors))
        onnx.save(done, path)

    makers = [
        ("ONNX Runtime static, min-max", "static", static(CalibrationMethod.MinMax, False)),
        ("ONNX Runtime static, min-max, 7-bit weights", "static", static(CalibrationMethod.MinMax, True)),
        ("ONNX Runtime static, percentile, 7-bit weights", "static", static(CalibrationMethod.Percentile, True)),
        ("NNCF", "static", nncf_model),
        ("ONNX Runtime dynamic", "dynamic, convolutions in float", dynamic(False)),
        ("ONNX Runtime dynamic, 7-bit weights", "dynamic, convolutions in float", dynamic(True)),
        # Its ConvInteger takes u8 weights with one scale only.
        ("ONNX Runtime dynamic, convolutions too", "dynamic", dynamic(False, LAYERS, False, QuantType.QUInt8)),
    ]
    for i, (title, kind, make) in enumerate(makers):
        path = out / f"{source.stem}.peer{i}.onnx"
        start = time.time()
        try:
            make(path)
            yield title, kind, path, time.time() - start
        except Exception as error:  # noqa: BLE001  a peer that fails is a row of the table
            yield title, kind, " ".join(f"{type(error).__name__}: {error}".split())[:160], time.time() - start


class OpenVino:
    """A model in OpenVINO, called as [`engines.session`]'s."""

    def __init__(self, path):
        import openvino

        self.model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})

    def rows(self, batch):
        return np.concatenate([self.model([batch[i : i + 1]])[0].copy() for i in range(len(batch))])


def elsewhere(ours):
    """Our files in the engines of others: title and what runs a batch."""
    for preset, path in ours.items():
        other = session(path, optimized=True)
        yield f"vedge {preset}, in ONNX Runtime", lambda batch, s=other: run_rows(s, batch)
        try:
            yield f"vedge {preset}, in OpenVINO", OpenVino(path).rows
        except ImportError:
            print("OpenVINO is not installed: left out", file=sys.stderr)


def compare(args, name, float_model, preprocess, pictures, read, chunks):
    """The rows of one model."""
    clean, ours = args.out / f"{name}.fp32.onnx", {}
    command(args.vedge, "convert", float_model, "-o", clean, "--precision", "fp32", "--preprocess", preprocess)
    seconds = {}
    for i, (title, kind, how) in enumerate(OURS):
        ours[title], start = args.out / f"{name}.ours{i}.onnx", time.time()
        command(args.vedge, "convert", float_model, "-o", ours[title], "--preprocess", preprocess, *how, "--calib", pictures, "--calib-count", args.calib)
        seconds[title] = (kind, time.time() - start)
    tensors = calibration(pictures, args.calib, read)
    others = list(peers(clean, tensors, args.out))
    sessions = {title: session(path, optimized=True) for title, _, path, _ in others if isinstance(path, Path)}
    same_files = dict(elsewhere(ours))
    reference, float_logits, classes, logits = session(clean, optimized=True), [], [], {}
    for batch, truth in chunks():
        float_logits.append(run_rows(reference, batch))
        classes.append(truth)
        for preset, path in ours.items():
            logits.setdefault(preset, []).append(Infer(args.run, path, batch).result())
        for title, s in sessions.items():
            logits.setdefault(title, []).append(run_rows(s, batch))
        for title, rows_of in same_files.items():
            logits.setdefault(title, []).append(rows_of(batch))
    floats, classes = np.concatenate(float_logits), np.concatenate(classes)
    top1 = lambda y: float((y.argmax(1) == classes).mean())  # noqa: E731

    def row(title, kind, key, took, failed=None):
        r = {"model": name, "pictures": len(classes), "calibration": len(tensors), "tool": title, "kind": kind, "seconds": took}
        if failed is not None:
            return r | {"failed": failed}
        y = np.concatenate(logits[key])
        return r | {"drop_points": 100 * (top1(floats) - top1(y)), "agreement": agreement(floats, y), "sqnr_db": sqnr(floats, y), "top1": top1(y)}

    rows = [row(f"vedge {preset}", kind, preset, took) for preset, (kind, took) in seconds.items()]
    rows += [row(t, k, t, took, None if isinstance(p, Path) else p) for t, k, p, took in others]
    rows += [row(t, "same file", t, 0.0) for t in same_files]
    rows.append(row("float", "float", None, 0.0, "") | {"top1": top1(floats)})
    for r in rows:
        print(json.dumps(r), flush=True)
    return rows


def markdown(rows):
    """The record as a table, and by how much ours are ahead."""
    lines = [
        "# INT8 beside other tools",
        "",
        f"Made by `tests/benches/peers.py` with ONNX Runtime {ort.__version__}. Same float model, same number of calibration pictures,",
        "the same test tensors; each against the float model. Peers run in ONNX Runtime as its users run it (graph optimizations on;",
        "on a CPU without VNNI its kernels saturate, hence the variants with 7-bit weights), ours in vedge-run.",
        "",
        "| model | pictures | tool | kind | lost, points | agreement | logit SQNR |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = [kind for _, kind, _ in OURS]
    for r in [r for r in rows if r["kind"] in kinds]:
        numbers = f"failed: {r['failed']} | | " if "failed" in r else f"{r['drop_points']:.2f} | {r['agreement']:.2%} | {r['sqnr_db']:.1f} dB "
        lines.append(f"| {r['model']} | {r['pictures']} | {r['tool']} | {r['kind']} | {numbers}|")
    lines.append("")
    for model in dict.fromkeys(r["model"] for r in rows):
        for kind in kinds:
            same = [r for r in rows if r["model"] == model and r["kind"] == kind and "sqnr_db" in r]
            ours = [r for r in same if r["tool"].startswith("vedge")]
            best = max((r for r in same if not r["tool"].startswith("vedge")), key=lambda r: r["sqnr_db"], default=None)
            if ours and best:
                lines.append(f"- {model}, {kind}: {ours[0]['sqnr_db'] - best['sqnr_db']:+.1f} dB against the best peer, {best['tool']}.")
    lines += ["", "## The same files in other engines", "", "Top-1; a `cpu` file has float activations there.", ""]
    lines += ["| model | preset | vedge-run | ONNX Runtime | OpenVINO | float |", "|---|---|---|---|---|---|"]
    for model in dict.fromkeys(r["model"] for r in rows):
        of = {r["tool"]: f"{r['top1']:.2%}" for r in rows if r["model"] == model and "top1" in r}
        for preset, _, _ in OURS:
            tools = [f"vedge {preset}", f"vedge {preset}, in ONNX Runtime", f"vedge {preset}, in OpenVINO", "float"]
            lines.append(f"| {model} | {preset} | {' | '.join(of.get(t, '') for t in tools)} |")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "run", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--models", default="deit_nano,mobilevit_nano,swin_nano,vits14_imagenette")
    parser.add_argument("--limit", type=int, default=10000, help="at most so many test pictures")
    parser.add_argument("--calib", type=int, default=128, help="calibration pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shared = os.environ.get("VEDGE_SHARED")
    rows = []
    for name in args.models.split(","):
        source = ROOT / "models" / f"{name}.onnx"
        if name.endswith(".onnx"):
            source = Path(name)
            pictures, read, chunks = stranger(args, source)
            rows += compare(args, source.stem, source, source.with_suffix(".json"), pictures, read, chunks)
            write(args.out, rows)
            continue
        if not source.exists():
            if not shared:
                print(f"skipped: {name} is in the shared data (VEDGE_SHARED)", file=sys.stderr)
                continue
            source = Path(shared) / "models" / f"{name}.onnx"
        if name.startswith("vits14"):
            data = Path(shared) / "data" / "imagenette"
            read = lambda path: parity.read_imagenette(path)[None]  # noqa: E731
            rows += compare(args, name, source, "imagenet", data / "calib", read, lambda: parity.imagenette(data / "val", args.limit))
        else:
            how = ROOT / "models" / "fashion.json"
            rows += compare(args, name, source, how, ROOT / "models/fashion/calibration", read_fashion, lambda: parity.fashion(args.limit))
        write(args.out, rows)


def write(out, rows):
    """The record so far."""
    (out / "peers.json").write_text(json.dumps(rows, indent=1))
    (out / "peers.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
