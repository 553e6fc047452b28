"""INT8 files of other tools: ONNX Runtime's forms, made here, and PyTorch's, made from one of them."""

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

# The same answer as ONNX Runtime on at least this share of pictures. Where every operator is quantized an answer depends on
# roundings along the way: ONNX Runtime itself gives another one on up to 1.5 % of pictures when 1e-6 is added to the input.
SAME = 0.995


class Reader(CalibrationDataReader):
    """Feeds ONNX Runtime's calibration."""

    def __init__(self, name, tensors):
        self.feed = iter([{name: t} for t in tensors])

    def get_next(self):
        return next(self.feed, None)


def forms(source, tensors, out):
    """Name, file and bound of each form of a float model."""
    name = onnx.load(source).graph.input[0].name
    unsigned, signed = QuantType.QUInt8, QuantType.QInt8
    layers = ["Conv", "MatMul", "Gemm"]

    def static(tag, bound, how, activations, **more):
        path = out / f"{source.stem}.{tag}.onnx"
        options = {"weight_type": signed, "per_channel": True} | more
        quantize_static(str(source), str(path), Reader(name, tensors), quant_format=how, activation_type=activations, **options)
        return tag, path, bound

    yield static("qdq-layers-signed", SAME, QuantFormat.QDQ, signed, op_types_to_quantize=layers, extra_options={"ActivationSymmetric": True})
    everything = static("qdq-all-unsigned", SAME, QuantFormat.QDQ, unsigned)
    yield everything
    yield "fake-quantization", fake_quantization(everything[1]), SAME
    yield static("operators-all", SAME, QuantFormat.QOperator, unsigned, per_channel=False)
    path = out / f"{source.stem}.dynamic.onnx"
    quantize_dynamic(str(source), str(path), per_channel=True, weight_type=signed, op_types_to_quantize=["MatMul", "Gemm"])
    yield "dynamic", path, SAME


def fake_quantization(path):
    """A file as PyTorch exports fake quantization: float weights behind Q/DQ, activations that use fewer integers by a Clip."""
    model = onnx.load(path)
    graph, nodes = model.graph, []
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for n in graph.node:
        weight = constants.get(n.input[0]) if n.op_type == "DequantizeLinear" else None
        if weight is not None and weight.dtype == np.int8:
            axis = next((a.i for a in n.attribute if a.name == "axis"), 0)
            scale = constants[n.input[1]].reshape([-1 if i == axis and constants[n.input[1]].size > 1 else 1 for i in range(weight.ndim)])
            value = n.input[0]
            graph.initializer.append(numpy_helper.from_array((weight * scale).astype(np.float32), f"{value}.float"))
            nodes.append(helper.make_node("QuantizeLinear", [f"{value}.float", *n.input[1:]], [f"{value}.fake"], axis=axis))
            n.input[0] = f"{value}.fake"
        nodes.append(n)
        if n.op_type == "QuantizeLinear" and constants.get(n.input[2], np.int8(0)).dtype == np.uint8:
            value, n.output[0] = n.output[0], f"{n.output[0]}.whole"
            graph.initializer.extend(numpy_helper.from_array(np.array(b, np.uint8), f"{value}.{b}") for b in (3, 250))
            nodes.append(helper.make_node("Clip", [n.output[0], f"{value}.3", f"{value}.250"], [value]))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    made = path.with_name(path.name.replace("qdq-all-unsigned", "fake-quantization"))
    onnx.save(model, made)
    return made
