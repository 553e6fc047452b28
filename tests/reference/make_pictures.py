#!/usr/bin/env python3
"""Makes pictures/: small pictures in every kind of file that vedge reads, and what Pillow makes of them.

Needs pillow and numpy. Deterministic; run it again only to add cases, and commit what it writes.
  NAME.{png,jpg}   the picture           NAME.npy        uint8 [H, W, 3] by Image.open(NAME).convert("RGB")
  resize_*.npy     uint8 [H, W, 3]: photo.png resized (and cropped as torchvision does) by Pillow
  view_*.npy       uint8 [H, W, 3]: a part of photo.png, turned clockwise, mirrored, then fitted (bicubic) as the name says;
                   beside the picture ImageNet's mean colour
  FORMAT_MATRIX_RANGE.raw   a camera's frame, 96x64;  .npy  uint8 [32, 40, 3]: its chroma repeated for the pixels that share
                            it, as RGB by the equations of ITU-R BT.601 or BT.709, resized by Pillow (bicubic)
"""
import pathlib, struct, zlib
import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent / "pictures"


def photo(width, height):
    """Smooth areas, edges and fine texture, different in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    r = 128 + 100 * np.sin(x / 9) * np.cos(y / 7)
    g = np.where((x // 11 + y // 13) % 2 == 0, 40, 220) + 20 * np.sin(x * 1.7)
    b = 255 * x / width * (1 - y / height) + 30 * ((x * 7 + y * 3) % 5 == 0)
    return np.clip(np.stack([r, g, b], -1), 0, 255).astype(np.uint8)


def png16(path, samples):
    """Pillow does not write 16-bit RGB: a PNG by hand. samples: uint16 [H, W, C]."""
    h, w, c = samples.shape
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    rows = b"".join(b"\0" + samples[y].astype(">u2").tobytes() for y in range(h))
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 3: 2, 4: 6}[c], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def keep(name, picture=None, **options):
    path = HERE / name
    if picture is not None:
        picture.save(path, **options)
    np.save(path.with_suffix(".npy"), np.asarray(Image.open(path).convert("RGB")))


def camera_frame(fourcc, matrix, full):
    """A frame of luma and chroma, and what Pillow makes of it."""
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}[matrix]
    black, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    rgb = photo(96, 64) / 255
    y = rgb @ [kr, 1 - kr - kb, kb]
    u, v = (rgb[..., 2] - y) / (2 - 2 * kb), (rgb[..., 0] - y) / (2 - 2 * kr)
    down = 2 if fourcc == "NV12" else 1
    shared = lambda c: c.reshape(64 // down, down, 48, 2).mean((1, 3))
    byte = lambda x: np.clip(np.round(x), 0, 255).astype(np.uint8)
    y, u, v = byte(black + luma * y), byte(128 + chroma * shared(u)), byte(128 + chroma * shared(v))
    if fourcc == "NV12":
        data = y.tobytes() + np.stack([u, v], -1).tobytes()
    else:
        pairs = [y[:, ::2], u, y[:, 1::2], v]
        data = np.stack([pairs["YUYV".index(c)] if c != "Y" else pairs[2 * (i > 1)] for i, c in enumerate(fourcc)], -1).tobytes()
    y = (y.astype(float) - black) / luma
    u, v = [(c.astype(float) - 128).repeat(down, 0).repeat(2, 1) / chroma for c in (u, v)]
    r, b = y + (2 - 2 * kr) * v, y + (2 - 2 * kb) * u
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    name = f"{fourcc.lower()}_{matrix}_{'full' if full else 'limited'}"
    (HERE / f"{name}.raw").write_bytes(data)
    picture = Image.fromarray(byte(255 * np.stack([r, g, b], -1)))
    np.save(HERE / f"{name}.npy", np.asarray(picture.resize((40, 32), Image.BICUBIC)))


def view(picture, fit, region, turns, flip, width, height):
    left, top, w, h = region
    picture = picture.crop((left, top, left + w, top + h))
    if turns:
        # Pillow turns the other way
        picture = picture.transpose([Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90][turns - 1])
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if fit == "squash":
        return picture.resize((width, height), Image.BICUBIC)
    if fit == "letterbox":
        scale = min(width / picture.width, height / picture.height)
        inside = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.BICUBIC)
        whole = Image.new("RGB", (width, height), (124, 116, 104))
        whole.paste(inside, ((width - inside.width) // 2, (height - inside.height) // 2))
        return whole
    short = int(width / 0.9)
    ratio = short / min(picture.size)
    resized = picture.resize(tuple(int(side * ratio) if side > min(picture.size) else short for side in picture.size), Image.BICUBIC)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


# Name, fit, region, quarter turns clockwise, mirrored, width and height of the model.
WHOLE = (0, 0, 97, 73)
VIEWS = [
    ("letterbox_wide", "letterbox", WHOLE, 0, False, 40, 56),
    ("letterbox_tall_turned_flipped", "letterbox", WHOLE, 1, True, 56, 40),
    ("region", "squash", (11, 7, 60, 50), 0, False, 48, 40),
    ("region_turned_270_crop", "crop", (5, 3, 80, 60), 3, False, 32, 32),
    ("turned_90", "squash", WHOLE, 1, False, 48, 40),
    ("turned_180_flipped_crop", "crop", WHOLE, 2, True, 48, 48),
    ("flipped", "squash", WHOLE, 0, True, 48, 40),
]


def main():
    HERE.mkdir(exist_ok=True)
    small = photo(29, 22)
    rgb = Image.fromarray(small)
    alpha = Image.fromarray((small[..., 0] // 2).astype(np.uint8))
    keep("rgb.png", rgb)
    keep("grey.png", rgb.convert("L"))
    keep("one_bit.png", rgb.convert("1"))
    keep("palette.png", rgb.quantize(16))
    keep("palette_transparent.png", rgb.quantize(16), transparency=3)
    rgba = rgb.copy(); rgba.putalpha(alpha)
    keep("rgba.png", rgba)
    la = rgb.convert("L"); la.putalpha(alpha)
    keep("grey_alpha.png", la)
    png16(HERE / "rgb16.png", small.astype(np.uint16) * 256 + 77)
    keep("rgb16.png")
    # Pillow clips 16-bit grey; the expectation is the high byte
    grey = small[..., :1]
    png16(HERE / "grey16.png", grey.astype(np.uint16) * 256 + 200)
    np.save(HERE / "grey16.npy", np.repeat(grey, 3, -1))
    keep("baseline.jpg", rgb, quality=92, subsampling=0)
    keep("subsampled.jpg", rgb, quality=92, subsampling=2)
    keep("progressive.jpg", rgb, quality=92, progressive=True)
    keep("grey_jpeg.jpg", rgb.convert("L"), quality=92)
    keep("cmyk.jpg", rgb.convert("CMYK"), quality=92)
    keep("standard_tables.jpg", rgb, quality=75, optimize=False)
    exif = Image.Exif(); exif[0x0112] = 6
    keep("rotated.jpg", rgb, quality=92, exif=exif)

    big = Image.fromarray(photo(97, 73)); big.save(HERE / "photo.png")
    filters = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
    for name, f in filters.items():
        for side, crop in ((32, 0.875), (64, 1.0), (120, 0.9)):
            short = int(side / crop)
            resized = big.resize((int(short * 97 / 73), short), f)
            top, left = round((resized.height - side) / 2), round((resized.width - side) / 2)
            np.save(HERE / f"resize_crop_{name}_{side}.npy", np.asarray(resized)[top : top + side, left : left + side])
        np.save(HERE / f"resize_squash_{name}_48x40.npy", np.asarray(big.resize((48, 40), f)))
    for name, *how in VIEWS:
        np.save(HERE / f"view_{name}.npy", np.asarray(view(big, *how)))
    for fourcc, matrix, full in (("YUYV", "601", False), ("NV12", "709", False), ("NV12", "601", True), ("UYVY", "709", True)):
        camera_frame(fourcc, matrix, full)


main()
