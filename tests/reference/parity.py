"""The same answers as ONNX Runtime.

Usage: parity.py --vedge VEDGE --run VEDGE_RUN --out FOLDER [--only zoo,fashion,shrunk,foreign,imagenette] [--limit N]

  zoo         float logits of every graph in tests/zoo that both load, converted to fp32
  fashion     the shipped models in INT8 (FOLDER/<model>.int8.onnx) on all 10,000 Fashion-MNIST test pictures
  shrunk      a model with tokens merged, neurons and heads out and INT8, in one file
  foreign     the shipped models in INT8 as ONNX Runtime and PyTorch write it
  imagenette  vits14_imagenette of the shared data in INT8 on its 1,000 pictures; skipped without shared data

INT8 is compared with ONNX Runtime on the same file with graph optimizations disabled. Both get the same tensors.
Writes FOLDER/parity.json and FOLDER/parity.md; fails when a bound below is missed.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import foreign
import onnx
import onnxruntime as ort
import zoo
from compare import agreement, relative_error, sqnr
from engines import Infer, Refused, command, run_rows, session
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models"))
import fashion_mnist  # noqa: E402

# Largest difference of float logits, relative to the largest logit.
FLOAT_ERROR = 1e-3
# Least share of pictures with the same answer, and least logit SQNR in dB, on the same INT8 file. A share of n pictures is
# known to twice its standard error: of 1,000, where three or six may lie on the edge between two classes, to 0.45 points, of
# 10,000 to 0.14. A fault in the arithmetic shows in the SQNR.
INT8_AGREEMENT, INT8_SQNR = 0.995, 35.0
# Accuracy that INT8 may lose against the float model, in points.
DROP = {"deit_nano": 0.5, "mobilevit_nano": 0.5, "vits14_imagenette": 1.0}
# Graphs whose architectures must work; of the others those that are refused are listed.
REQUIRED = ("vit_tiny", "deit_tiny_distilled", "mobilevit_xxs", "hf_mobilevit_xxs", "hf_vit_tiny", "swin_tiny", "hf_swin")


def check_zoo(args):
    """One row a graph: name, relative error or why it was refused, and whether that passes."""
    rows = []
    for name, path, expected in zoo.entries():
        shape = expected["input"]["shape"]
        source, converted = args.out / "zoo" / f"{name}.onnx", args.out / "zoo" / f"{name}.fp32.onnx"
        source.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(zoo.inflate(path), source)
        inputs = zoo.generate(7, shape)
        row = {"model": name, "error": None, "refused": None}
        try:
            size = ["--size", f"{shape[2]}x{shape[3]}"] if len(shape) == 4 else []
            command(args.vedge, "convert", source, "-o", converted, "--precision", "fp32", "--preprocess", "unit", *size)
            onnx.checker.check_model(str(converted), full_check=True)
            ours = Infer(args.run, converted, inputs, threads=2).result()
            reference = session(source, optimized=False, threads=2)
            outputs = [o.name for o in reference.get_outputs()]
            card = json.loads({p.key: p.value for p in onnx.load(converted).metadata_props}["vedge.card"])
            theirs = run_rows(reference, inputs, outputs.index(card["output"]["name"]))
            if ours.shape != theirs.shape:
                raise Refused(f"wrong shape: ours {ours.shape}, ONNX Runtime {theirs.shape}")
            row["error"] = relative_error(theirs, ours)
        except Refused as e:
            row["refused"] = str(e).replace(f"{source.parent}/", "")
        finally:
            source.unlink(missing_ok=True)
            converted.unlink(missing_ok=True)
        # Not loading is allowed outside the required architectures; a wrong answer or a crash is not.
        crashed = row["refused"] is not None and not row["refused"].startswith(("status 1:", "status 2:"))
        row["passed"] = row["error"] <= FLOAT_ERROR if row["error"] is not None else not (name.startswith(REQUIRED) or crashed)
        outcome = f"{row['error']:.1e}" if row["error"] is not None else f"refused: {row['refused']}"
        print(f"{'ok    ' if row['passed'] else 'FAILED'} {name:34} {outcome}", flush=True)
        rows.append(row)
    return rows


def fashion_tensor(picture):
    """A grey picture as a tensor [3, 64, 64], as models/fashion.json says."""
    grey = np.asarray(picture.resize((64, 64), Image.BILINEAR), np.float32)
    return np.repeat(((grey / np.float32(255) - np.float32(0.5)) / np.float32(0.25))[None], 3, axis=0)


def fashion(limit):
    """Chunks of tensors [n, 3, 64, 64] and classes [n]."""
    pictures, classes = fashion_mnist.load("test")
    for start in range(0, min(limit, len(pictures)), 500):
        chunk = pictures[start : start + 500]
        yield np.stack([fashion_tensor(Image.fromarray(p)) for p in chunk]), classes[start : start + 500]


def read_imagenette(path):
    """A picture as a tensor [3, 224, 224]: shorter side 256 bicubic, centre 224, ImageNet mean and std."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    picture = Image.open(path).convert("RGB")
    width, height = (int(side * 256 / min(picture.size)) for side in picture.size)
    picture = picture.resize((width, height), Image.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32)
    return ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)


def imagenette(folder, limit):
    """Chunks of tensors [n, 3, 224, 224] and classes [n]."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    files = files[:: max(1, len(files) // limit)]
    for start in range(0, len(files), 50):
        chunk = files[start : start + 50]
        yield np.stack([read_imagenette(path) for path in chunk]), np.array([int(path.parent.name.split("_")[0]) for path in chunk])


def check_int8(args, name, float_model, int8_model, chunks):
    """The INT8 file here and in ONNX Runtime, the float model in ONNX Runtime, on the same tensors."""
    onnx.checker.check_model(str(int8_model), full_check=True)
    reference, float_reference = session(int8_model, optimized=False), session(float_model, optimized=True)
    ours, theirs, floats, classes, start = [], [], [], [], time.time()
    for batch, truth in chunks():
        running = Infer(args.run, int8_model, batch)
        theirs.append(run_rows(reference, batch))
        floats.append(run_rows(float_reference, batch))
        ours.append(running.result())
        classes.append(truth)
    ours, theirs, floats, classes = (np.concatenate(parts) for parts in (ours, theirs, floats, classes))
    top1 = lambda logits: float((logits.argmax(1) == classes).mean())  # noqa: E731
    row = {
        "model": name,
        "pictures": len(classes),
        "agreement": agreement(theirs, ours),
        "sqnr_db": sqnr(theirs, ours),
        "agreement_float": agreement(floats, ours),
        "sqnr_float_db": sqnr(floats, ours),
        "top1_float": top1(floats),
        "top1_int8_onnxruntime": top1(theirs),
        "top1_int8": top1(ours),
    }
    row["drop_points"] = 100 * (row["top1_float"] - row["top1_int8"])
    error = (INT8_AGREEMENT * (1 - INT8_AGREEMENT) / row["pictures"]) ** 0.5
    same = row["agreement"] >= INT8_AGREEMENT - 2 * error and row["sqnr_db"] >= INT8_SQNR
    row["passed"] = same and row["drop_points"] <= DROP[name]
    print(
        f"{'ok    ' if row['passed'] else 'FAILED'} {name}: {row['pictures']} pictures, agreement {row['agreement']:.2%}, "
        f"SQNR {row['sqnr_db']:.1f} dB; against float: top-1 {row['top1_float']:.2%} -> {row['top1_int8']:.2%} "
        f"({row['drop_points']:.2f} points lost), agreement {row['agreement_float']:.2%}, SQNR {row['sqnr_float_db']:.1f} dB "
        f"({time.time() - start:.0f} s)",
        flush=True,
    )
    return row


# Pictures that each foreign file is compared on, and those it is calibrated with.
FOREIGN, FOREIGN_CALIBRATION = 300, 16


def check_foreign(args):
    """One row a file of another tool's: the same answers as ONNX Runtime, and layers in integers."""
    rows = []
    batch = np.concatenate([pictures for pictures, _ in fashion(FOREIGN)])[:FOREIGN]
    for name in ("deit_nano", "mobilevit_nano"):
        source = args.out / "foreign" / f"{name}.onnx"
        source.parent.mkdir(parents=True, exist_ok=True)
        how = ROOT / "models" / "fashion.json"
        command(args.vedge, "convert", ROOT / "models" / f"{name}.onnx", "-o", source, "--precision", "fp32", "--preprocess", how)
        for form, path, bound in foreign.forms(source, [batch[i : i + 1] for i in range(FOREIGN_CALIBRATION)], source.parent):
            running = Infer(args.run, path, batch)
            theirs, ours = run_rows(session(path, optimized=False), batch), running.result()
            ways = json.loads(command(args.vedge, "inspect", path, "--json"))["runs"]
            row = {"model": f"{name} {form}", "agreement": agreement(theirs, ours), "sqnr_db": sqnr(theirs, ours), "bound": bound}
            row["integer"] = sum(w["integer"] for w in ways.values())
            row["passed"] = row["agreement"] >= bound and row["integer"] > 0
            print(
                f"{'ok    ' if row['passed'] else 'FAILED'} {row['model']}: agreement {row['agreement']:.2%} (bound {bound:.1%}), "
                f"SQNR {row['sqnr_db']:.1f} dB, {row['integer']} operators in integers",
                flush=True,
            )
            rows.append(row)
    shutil.rmtree(args.out / "foreign")
    return rows


def check_vits14(args, shared):
    """Converts vits14 and compares; its pictures are only in the shared data."""
    source, int8_model = shared / "models" / "vits14_imagenette.onnx", args.out / "vits14_imagenette.int8.onnx"
    pictures = shared / "data" / "imagenette"
    command(
        *(args.vedge, "convert", source, "-o", int8_model, "--precision", "int8"),
        *("--preprocess", "imagenet", "--calib", pictures / "calib"),
    )
    return check_int8(args, "vits14_imagenette", source, int8_model, lambda: imagenette(pictures / "val", args.limit))


# Everything at once: tokens merged, neurons and heads out, the classifier fitted again, INT8.
SHRUNK = ("--merge-tokens", "3", "--prune-mlp", "10", "--prune-heads", "10")
# An engine that sums in another order may merge another pair where two are equally alike.
SHRUNK_AGREEMENT = 0.99


def check_shrunk(args):
    """A model shrunk in every way, in one file: the same answers in ONNX Runtime."""
    path, how = args.out / "deit_nano.shrunk.onnx", ROOT / "models" / "fashion.json"
    calibration = ("--calib", ROOT / "models" / "fashion" / "calibration")
    command(args.vedge, "convert", ROOT / "models" / "deit_nano.onnx", "-o", path, "--preprocess", how, *calibration, *SHRUNK)
    onnx.checker.check_model(str(path), full_check=True)
    batch = np.concatenate([pictures for pictures, _ in fashion(FOREIGN)])[:FOREIGN]
    running = Infer(args.run, path, batch)
    theirs, ours = run_rows(session(path, optimized=False), batch), running.result()
    same = agreement(theirs, ours)
    print(f"{'ok    ' if same >= SHRUNK_AGREEMENT else 'FAILED'} deit_nano shrunk: agreement {same:.2%}, SQNR {sqnr(theirs, ours):.1f} dB", flush=True)
    return {"model": "deit_nano shrunk", "agreement": same, "sqnr_db": sqnr(theirs, ours), "passed": same >= SHRUNK_AGREEMENT}


def markdown(record):
    """The record as tables."""
    lines = [
        "# The same answers as ONNX Runtime",
        "",
        f"Made by `tests/run parity` with ONNX Runtime {record['onnxruntime']}, graph optimizations disabled for the reference.",
        "",
    ]
    if record["int8"]:
        lines += [
            "## INT8",
            "",
            "The same file here and in ONNX Runtime: share of pictures with the same answer and logit SQNR "
            f"(bounds: {INT8_AGREEMENT:.1%} within twice its standard error, {INT8_SQNR:.0f} dB); and what INT8 loses against the float model.",
            "",
            "| model | pictures | same answer | SQNR | float top-1 | INT8 top-1 | lost, points | INT8 and float agree | SQNR to float |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['model']} | {r['pictures']} | {r['agreement']:.2%} | {r['sqnr_db']:.1f} dB | {r['top1_float']:.2%} "
            f"| {r['top1_int8']:.2%} | {r['drop_points']:.2f} | {r['agreement_float']:.2%} | {r['sqnr_float_db']:.1f} dB |"
            for r in record["int8"]
        ]
        lines.append("")
    if record["foreign"]:
        lines += [
            "## INT8 files of other tools",
            "",
            f"Made by ONNX Runtime's quantizer from {FOREIGN_CALIBRATION} pictures (fake quantization: as PyTorch writes it), run on {FOREIGN} pictures.",
            "",
            "| file | same answer | bound | SQNR | operators in integers |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['model']} | {r['agreement']:.2%} | {r['bound']:.1%} | {r['sqnr_db']:.1f} dB | {r['integer']} |" for r in record["foreign"]
        ]
        lines.append("")
    if record["zoo"]:
        lines += [
            "## Float",
            "",
            "Largest difference of the logits, relative to the largest logit, after `vedge convert --precision fp32` "
            f"(bound: {FLOAT_ERROR:g}).",
            "",
            "| graph | difference | refused |",
            "|---|---|---|",
        ]
        for r in record["zoo"]:
            difference = f"{r['error']:.1e}" if r["error"] is not None else ""
            lines.append(f"| {r['model']} | {difference} | {(r['refused'] or '').replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "run", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", default="zoo,fashion,shrunk,foreign,imagenette")
    parser.add_argument("--limit", type=int, default=10000, help="at most so many pictures")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - {"zoo", "fashion", "shrunk", "foreign", "imagenette"}:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}")

    record = {"onnxruntime": ort.__version__, "zoo": [], "shrunk": [], "foreign": [], "int8": []}
    if "zoo" in parts:
        record["zoo"] = check_zoo(args)
    if "fashion" in parts:
        for name in ("mobilevit_nano", "deit_nano"):
            models = ROOT / "models" / f"{name}.onnx", args.out / f"{name}.int8.onnx"
            record["int8"].append(check_int8(args, name, *models, lambda: fashion(args.limit)))
    if "shrunk" in parts:
        record["shrunk"] = [check_shrunk(args)]
    if "foreign" in parts:
        record["foreign"] = check_foreign(args)
    if "imagenette" in parts:
        if shared := os.environ.get("VEDGE_SHARED"):
            record["int8"].append(check_vits14(args, Path(shared)))
        else:
            print("skipped: vits14_imagenette is in the shared data (VEDGE_SHARED)")

    (args.out / "parity.json").write_text(json.dumps(record, indent=1))
    (args.out / "parity.md").write_text(markdown(record))
    failed = [row["model"] for rows in (record["zoo"], record["shrunk"], record["foreign"], record["int8"]) for row in rows if not row["passed"]]
    if "zoo" in parts:
        compared = sum(row["error"] is not None for row in record["zoo"])
        print(f"{compared} of {len(record['zoo'])} zoo graphs compared, the others refused")
    if failed:
        raise SystemExit(f"not the same answers as ONNX Runtime: {', '.join(failed)}")


if __name__ == "__main__":
    main()
