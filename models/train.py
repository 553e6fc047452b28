"""Trains the shipped models on Fashion-MNIST (28×28 grey, shown as 64×64 RGB) and exports them to ONNX beside this file.

Usage: python3 models/train.py deit_nano|mobilevit_nano [EPOCHS]

  deit_nano       DeiT with a distillation token: 64×64, patch 8, width 128, 8 blocks, 4 heads (1.6 M parameters)
  mobilevit_nano  MobileViT-XXS (0.95 M parameters)

Made with Python 3.11, torch 2.9.1, timm 1.0.31, onnx 1.23.2, onnxruntime 1.32.0 and Debian's dataset-fashion-mnist, on one
CPU thread, for two to six epochs: a longer run does better. Environment: FASHION_MNIST the folder of the data set, LR the
peak learning rate, INIT weights (.pt) to go on from.
"""

import os
import sys
import time
from pathlib import Path

import onnxruntime as ort
import timm
import torch
import torch.nn.functional as F
from fashion_mnist import load
from timm.models.deit import VisionTransformerDistilled
from torch import nn

SIZE, MEAN, STD = 64, 0.5, 0.25
BATCH = 64
HERE = Path(__file__).parent


def make(name):
    if name == "mobilevit_nano":
        return timm.create_model("mobilevit_xxs", num_classes=10), 2e-3
    if name == "deit_nano":
        model = VisionTransformerDistilled(
            img_size=SIZE, patch_size=8, embed_dim=128, depth=8, num_heads=4, num_classes=10
        )
        return model, 1e-3
    raise SystemExit(f"{name}: no such model (deit_nano, mobilevit_nano)")


def preprocess(pictures):
    """u8 [B, 28, 28] to f32 [B, 3, 64, 64]: bilinear, three equal channels, (x / 255 - mean) / std."""
    x = F.interpolate(pictures[:, None].float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return ((x / 255 - MEAN) / STD).expand(-1, 3, -1, -1).contiguous()


def augment(pictures):
    """One random flip and one shift by up to two pixels for the whole batch."""
    if torch.rand(()) < 0.5:
        pictures = pictures.flip(-1)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(pictures, (down, right), (1, 2))


def train(model, rate, epochs, pictures, classes):
    steps = int(epochs * len(pictures) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    order, at, start = torch.randperm(len(pictures)), 0, time.time()
    model.train()
    for step in range(steps):
        if at + BATCH > len(order):
            order, at = torch.randperm(len(pictures)), 0
        batch = order[at : at + BATCH]
        at += BATCH
        out = model(preprocess(augment(pictures[batch])))
        heads = out if isinstance(out, tuple) else (out,)
        loss = sum(F.cross_entropy(logits, classes[batch], label_smoothing=0.05) for logits in heads)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)


def main():
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    name, epochs = sys.argv[1], float(sys.argv[2]) if len(sys.argv) == 3 else 6.0
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pictures, classes = (torch.from_numpy(a.copy()) for a in load("train"))
    test_pictures, test_classes = (torch.from_numpy(a.copy()) for a in load("test"))

    model, rate = make(name)
    if "INIT" in os.environ:
        model.load_state_dict(torch.load(os.environ["INIT"]))
    train(model, float(os.environ.get("LR", rate)), epochs, pictures, classes.long())
    torch.save(model.state_dict(), HERE / f"{name}.pt")

    model.eval()
    path = HERE / f"{name}.onnx"
    torch.onnx.export(
        model,
        preprocess(test_pictures[:1]),
        str(path),
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamo=False,
    )
    session = ort.InferenceSession(path)
    right = sum(
        int(session.run(None, {"input": preprocess(test_pictures[i : i + 1]).numpy()})[0].argmax()) == int(test_classes[i])
        for i in range(len(test_pictures))
    )
    print(f"{path}: {path.stat().st_size} bytes, top-1 {right / len(test_pictures):.4f} on {len(test_pictures)} test pictures")


if __name__ == "__main__":
    main()
