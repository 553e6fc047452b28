"""The zoo's graphs with their regenerated weights (tests/zoo/FORMAT.md)."""

import json
from pathlib import Path

import numpy as np
import onnx

FOLDER = Path(__file__).resolve().parents[1] / "zoo"


def generate(seed, shape, mean=0.0, std=1.0):
    """SplitMix64 of seed + i, top 24 bits, uniform around the mean with the standard deviation."""
    n = np.uint64
    x = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        x += n(seed) + n(0x9E3779B97F4A7C15)
        x = (x ^ (x >> n(30))) * n(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> n(27))) * n(0x94D049BB133111EB)
        x ^= x >> n(31)
    u = (x >> n(40)).astype(np.float64) / 16777216.0
    return (float(mean) + (float(std) * 1.7320508075688772) * (2.0 * u - 1.0)).astype(np.float32).reshape(shape)


def _graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def inflate(path):
    """The model in a zoo file, weights filled in."""
    model = onnx.load(path, load_external_data=False)
    slots = {}
    for graph in _graphs(model.graph):
        slots |= {("init", tensor.name): tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                slots |= {("const", node.output[0]): a.t for a in node.attribute if a.name == "value"}
    recipe = path.with_name(path.name.removesuffix(".onnx") + ".recipe.json")
    for entry in json.loads(recipe.read_text())["tensors"]:
        tensor = slots[entry["where"], entry["name"]]
        assert list(tensor.dims) == entry["shape"] and not tensor.raw_data and not tensor.float_data, entry["name"]
        tensor.raw_data = generate(entry["seed"], entry["shape"], entry["mean"], entry["std"]).astype("<f4").tobytes()
    return model


def entries():
    """Name, path and expected answers of every graph in the zoo."""
    for path in sorted(FOLDER.glob("*.onnx")):
        name = path.name.removesuffix(".onnx")
        yield name, path, json.loads((FOLDER / f"{name}.expect.json").read_text())
