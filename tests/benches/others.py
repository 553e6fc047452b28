"""Trains small models that nothing here was made for, so that defaults can be judged on strangers (`peers.py --models FOLDER/NAME.onnx`).

Usage: others.py NAME FOLDER [STEPS]

  vit_cifar        ViT as people train it on CIFAR: 32x32, patch 4, 6 blocks of width 192, mean of the tokens; Fashion-MNIST
  deit_distilled   DeiT with class and distillation tokens, 32x32, patch 4, 6 blocks of width 144; Fashion-MNIST
  vit_postnorm     ViT with LayerNorm behind each residual sum, 32x32, patch 4, 6 blocks of width 128; Fashion-MNIST
  mobilevit_photo  MobileViT-XXS at 128x128 on photographs: the 500 calibration pictures of Imagenette (VEDGE_SHARED)

Writes FOLDER/NAME.onnx and FOLDER/NAME.json, its preprocessing. One thread, a quarter of an hour each; made with torch 2.9.1 and
timm 1.0.31. None of these is a good classifier: they are to be as sensitive as real weights are.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))
from fashion_mnist import load  # noqa: E402

SMALL = {"img_size": 32, "patch_size": 4, "num_classes": 10, "depth": 6}
MODELS = {
    "vit_cifar": lambda: VisionTransformer(**SMALL, embed_dim=192, num_heads=3, class_token=False, global_pool="avg"),
    "deit_distilled": lambda: VisionTransformerDistilled(**SMALL, embed_dim=144, num_heads=3),
    "vit_postnorm": lambda: VisionTransformer(**SMALL, embed_dim=128, num_heads=4, block_fn=ResPostBlock, init_values=None),
    "mobilevit_photo": lambda: timm.create_model("mobilevit_xxs", num_classes=10),
}


def fashion():
    """Batches without end, [n, 3, 32, 32] and classes."""
    pictures, classes = (torch.from_numpy(a.copy()) for a in load("train"))
    while True:
        for batch in torch.randperm(len(pictures)).split(64):
            x = F.interpolate(pictures[batch][:, None].float(), size=(32, 32), mode="bilinear", align_corners=False)
            x = torch.roll(x.flip(-1) if torch.rand(()) < 0.5 else x, torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            yield ((x / 255 - 0.5) / 0.25).expand(-1, 3, -1, -1).contiguous(), classes[batch].long()


def photographs():
    """Batches without end of random crops, [n, 3, 128, 128] in 0…1, and classes."""
    files = sorted((Path(os.environ["VEDGE_SHARED"]) / "data/imagenette/calib").glob("*/*"))
    read = lambda f: torch.from_numpy(np.asarray(Image.open(f).convert("RGB").resize((224, 224), Image.BICUBIC)).copy())  # noqa: E731
    pictures = torch.stack([read(f) for f in files]).permute(0, 3, 1, 2)
    classes = torch.tensor([int(f.parent.name.split("_")[0]) for f in files])

    def crop(x):
        side = int(torch.randint(110, 225, ()))
        top, left = (int(torch.randint(0, 225 - side, ())) for _ in range(2))
        x = x[:, top : top + side, left : left + side]
        x = F.interpolate(x[None].float() / 255, size=(128, 128), mode="bilinear", align_corners=False, antialias=True)[0]
        return ((x.flip(-1) if torch.rand(()) < 0.5 else x) * (0.7 + 0.6 * torch.rand(3, 1, 1))).clamp(0, 1)

    while True:
        for batch in torch.randperm(len(files)).split(24):
            yield torch.stack([crop(pictures[i]) for i in batch]), classes[batch]


def main():
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in MODELS:
        raise SystemExit(__doc__)
    name, folder = sys.argv[1], Path(sys.argv[2])
    photo = name == "mobilevit_photo"
    steps = int(sys.argv[3]) if len(sys.argv) == 4 else 1200
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, rate = MODELS[name](), 2e-3 if photo else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    start, batches = time.time(), photographs() if photo else fashion()
    for step, (x, y) in zip(range(steps), batches):
        out = model.train()(x)
        loss = sum(F.cross_entropy(o, y, label_smoothing=0.05) for o in (out if isinstance(out, tuple) else (out,)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{name} {step}/{steps} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model.eval(), x[:1], str(folder / f"{name}.onnx"), opset_version=17, input_names=["input"], output_names=["logits"], dynamo=False
    )
    mean, std = (0.0, 1.0) if photo else (0.5, 0.25)
    how = {"fit": "squash", "filter": "bilinear", "mean": [mean] * 3, "std": [std] * 3}
    (folder / f"{name}.json").write_text(json.dumps(how))


if __name__ == "__main__":
    main()
