#!/usr/bin/env python3
"""Makes tests/reference/resize/: what timm answers at other resolutions. Needs torch 2.9.1, timm 1.0.31, onnx, onnxscript.

positions.json  position grids before and after timm's resample_abs_pos_embed
kernels.json    patch kernels before and after timm's resample_patch_embed
<model>.onnx    a tiny ViT (with one or two tokens before the patches) exported at 32x32 pixels
swin.*.onnx     a tiny Swin; the window of its last stage is as large as its picture
coatnet.*.onnx  a tiny CoAtNet: convolutions, then attention with a bias by relative position
models.json     their logits at other sizes and with other patches, after timm's own set_input_size
"""
import copy
import json
import pathlib

import numpy as np
import onnx
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

try:
    from timm.models.deit import VisionTransformerDistilled
except ImportError:
    from timm.models.vision_transformer import VisionTransformerDistilled

HERE = pathlib.Path(__file__).parent / "resize"


def values(seed, shape):
    """The zoo's generator (tests/zoo/FORMAT.md), mean 0, standard deviation 1."""
    u64 = np.uint64
    with np.errstate(over="ignore"):
        x = np.arange(int(np.prod(shape)), dtype=u64) + u64(seed) + u64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> u64(30))) * u64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> u64(27))) * u64(0x94D049BB133111EB)
        x = x ^ (x >> u64(31))
    u = (x >> u64(40)).astype(np.float64) / 16777216.0
    return torch.from_numpy((1.7320508075688772 * (2.0 * u - 1.0)).astype(np.float32).reshape(shape))


def numbers(t):
    return [float(f"{v:.9g}") for v in t.flatten().tolist()]


def positions():
    cases = []
    for prefix, old, new in [(1, (7, 7), (5, 5)), (1, (4, 4), (6, 6)), (2, (5, 5), (3, 8)), (0, (6, 6), (2, 2)), (1, (4, 6), (6, 5))]:
        seed, width = 11 + len(cases), 3
        before = values(seed, (1, prefix + old[0] * old[1], width))
        after = resample_abs_pos_embed(before, new, old_size=old, num_prefix_tokens=prefix)
        cases.append({"prefix": prefix, "old": old, "new": new, "width": width, "seed": seed, "after": numbers(after)})
    return cases


def kernels():
    cases = []
    for old, new in [((8, 8), (8, 8)), ((8, 8), (12, 12)), ((8, 8), (6, 6)), ((16, 16), (14, 14)), ((4, 6), (8, 4))]:
        seed = 31 + len(cases)
        after = resample_patch_embed(values(seed, (2, 1, *old)).double(), list(new))
        cases.append({"old": old, "new": new, "seed": seed, "after": numbers(after)})
    return cases


def models():
    common = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    made = {
        "vit": VisionTransformer(**common),
        "distilled": VisionTransformerDistilled(**common),
        "mean": VisionTransformer(**common, global_pool="avg", class_token=False),
        "late": VisionTransformer(**common, no_embed_class=True),
        "swin": SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=4, depths=(2, 2, 2), num_heads=(1, 2, 2), mlp_ratio=2, num_classes=5),
        "coatnet": MaxxVit(
            MaxxVitCfg(
                embed_dim=(4, 8), depths=(1, 2), block_type=("C", "T"), stem_width=4,
                transformer_cfg=MaxxVitTransformerCfg(dim_head=4, rel_pos_type="bias"),
            ),
            img_size=32, num_classes=5,
        ),
    }
    sizes = {name: [(32, 32), (48, 48), (40, 64), (16, 24)] for name in made}
    # Padded windows and odd merging; windows that shrink; a last stage that gets several windows, in one direction or both.
    sizes["swin"] = [(32, 32), (24, 24), (28, 20), (48, 48), (64, 32), (8, 8), (40, 24)]
    sizes["coatnet"] = [(32, 32), (48, 48), (16, 64), (24, 40)]
    # Smaller and larger patches, with and without another number of them, oblong ones.
    patches = {name: [((32, 32), (16, 16)), ((48, 48), (12, 12)), ((40, 30), (5, 10))] for name in ("vit", "distilled", "mean", "late")}
    patches["swin"] = [((32, 32), (4, 4)), ((48, 36), (3, 3))]
    answers = []
    for name, model in made.items():
        model.eval()
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(values(1000 + i, tuple(p.shape)) * 0.3)
        for exporter, dynamo in (("ts", False), ("dynamo", True)):
            file = HERE / f"{name}.{exporter}.onnx"
            picture = torch.zeros(1, 3, 32, 32)
            opset = 18 if dynamo else 17
            torch.onnx.export(model, (picture,), str(file), dynamo=dynamo, opset_version=opset,
                              input_names=["input"], output_names=["logits"])
            # One file, without the exporter's source locations.
            m = onnx.load(str(file))
            for n in m.graph.node:
                del n.metadata_props[:]
                n.doc_string = ""
            onnx.save(m, str(file), save_as_external_data=False)
            file.with_suffix(".onnx.data").unlink(missing_ok=True)
        for size, patch in [(size, None) for size in sizes[name]] + patches.get(name, []):
            resized = copy.deepcopy(model)
            # Swin's windows stay as large as they were.
            more = ({"window_size": 4} if name == "swin" else {}) | ({"patch_size": patch} if patch else {})
            resized.set_input_size(img_size=size, **more)
            with torch.no_grad():
                logits = resized(values(7, (1, 3, *size)))
            answers.append({"model": name, "size": size, "patch": patch, "logits": numbers(logits)})
    return answers


def main():
    HERE.mkdir(exist_ok=True)
    (HERE / "positions.json").write_text(json.dumps(positions()) + "\n")
    (HERE / "kernels.json").write_text(json.dumps(kernels()) + "\n")
    (HERE / "models.json").write_text(json.dumps(models()) + "\n")
    print("made with torch", torch.__version__, "timm", timm.__version__)


if __name__ == "__main__":
    main()
