#!/usr/bin/env python3
"""The models of the speed records: full-size architectures with random weights, and their INT8 forms by other tools.

    models.py OUT [--models deit_tiny,…] [--pictures DIR] [--vedge PROGRAM]

Writes OUT/NAME.onnx (timm's architecture and initialization, seeded, exported at a fixed size), for ONNX Runtime and
OpenVINO OUT/NAME.{qdq,gemm,dynamic}.onnx, and with --pictures OUT/NAME.{auto,portable,fp32}.vedge.onnx made by `vedge
convert`. Files that exist are kept. Needs torch, timm, onnx and onnxruntime.
"""
import argparse, os, subprocess, sys
import numpy as np

# Name, timm's name, input size.
MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", 224),
    "deit_small": ("deit_small_patch16_224", 224),
    "mobilevit_xxs": ("mobilevit_xxs", 256),
    "mobilevit_s": ("mobilevit_s", 256),
    "swin_tiny": ("swin_tiny_patch4_window7_224", 224),
}


def export(name, path):
    import timm, torch
    torch.manual_seed(7)
    architecture, size = MODELS[name]
    model = timm.create_model(architecture, pretrained=False).eval()
    # Statistics of BatchNorm as after some training: ones and zeros would be folded to nothing.
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    torch.onnx.export(model, torch.zeros(1, 3, size, size), path, opset_version=17, dynamo=False,
                      input_names=["pixels"], output_names=["logits"])


class Calibration:
    """Eight random pictures: the peers' files are for speed alone."""

    def __init__(self, size):
        rng = np.random.default_rng(7)
        self.pictures = iter([{"pixels": rng.standard_normal((1, 3, size, size), dtype=np.float32)} for _ in range(8)])

    def get_next(self):
        return next(self.pictures, None)


def quantize(name, source, out):
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process
    size = MODELS[name][1]
    prepared = f"{out}/{name}.prepared.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    static = dict(quant_format=q.QuantFormat.QDQ, activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                  per_channel=True, calibrate_method=q.CalibrationMethod.MinMax)
    steps = {
        "qdq": lambda to: q.quantize_static(prepared, to, Calibration(size), **static),
        # Only products with constant weights: attention and element-wise operators stay in float.
        "gemm": lambda to: q.quantize_static(prepared, to, Calibration(size), **static,
                                             op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                                             nodes_to_exclude=products_of_activations(onnx.load(prepared))),
        "dynamic": lambda to: q.quantize_dynamic(prepared, to, weight_type=q.QuantType.QInt8, per_channel=True,
                                                 op_types_to_quantize=["MatMul", "Gemm"],
                                                 extra_options={"MatMulConstBOnly": True}),
    }
    for kind, make in steps.items():
        to = f"{out}/{name}.{kind}.onnx"
        if not os.path.exists(to):
            make(to)
    os.remove(prepared)


def products_of_activations(model):
    constants = {i.name for i in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "MatMul" and not constants & set(n.input)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--pictures", help="folder of calibration pictures for vedge convert")
    p.add_argument("--vedge", default=os.path.join(os.path.dirname(__file__), "../../target/release/vedge"))
    a = p.parse_args()
    os.makedirs(a.out, exist_ok=True)
    for name in a.models.split(","):
        if name not in MODELS:
            p.error(f"no model `{name}`; there are {', '.join(MODELS)}")
        source = f"{a.out}/{name}.onnx"
        if not os.path.exists(source):
            export(name, source)
        quantize(name, source, a.out)
        if not a.pictures:
            continue
        calibrated = ["--precision", "int8", "--preprocess", "imagenet", "--calib", a.pictures]
        for kind, options in {"auto": calibrated, "portable": [*calibrated, "--preset", "portable"],
                              "fp32": ["--precision", "fp32", "--preprocess", "imagenet"]}.items():
            to = f"{a.out}/{name}.{kind}.vedge.onnx"
            if not os.path.exists(to):
                subprocess.run([a.vedge, "convert", source, "-o", to, *options], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
