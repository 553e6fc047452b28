"""The board program on a real V4L2 driver: an arm64 virtual machine whose virtual camera shows known pictures.

Usage: run.py --board VEDGE_RUN --feed FEED --host VEDGE_RUN --model MODEL.onnx [--cpu cortex-a72] [--work target/vm]

Boots Debian's arm64 kernel with the driver vivid under qemu-system-aarch64, plays shipped test pictures into its output
node (tests/vm/feed), captures them from /dev/video0 with the board program, one pixel format after the other, and compares
every label with the picture's class and with what the same program says here for the same picture from a file, and every byte
of the frames with what was played. A second camera, /dev/video2, has several planes a buffer and shows a test pattern, on which
all formats must agree with the first camera, byte for byte where that has the format, too; it loses frames, the clock jumps, it fails and is unplugged while the program runs, and comes back under another number. A third one,
/dev/video9 of the driver v4l2loopback, gives JPEG frames as webcams make them: without Huffman tables, with bytes after the
end, cut off, and empty; the bytes of these, too, must come through as they were written.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from initramfs import initramfs
from PIL import Image

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parents[1] / "models" / "fashion" / "test"
WIDTH, HEIGHT = 320, 240
FRAMES = 4
# Pixel format and picture: each format the board program reads and vivid has, pictures of different classes.
CASES = [
    ("RGB3", "1_trouser/00002.png"),
    ("RGB3", "9_ankle-boot/00000.png"),
    ("BGR3", "1_trouser/00002.png"),
    ("XR24", "9_ankle-boot/00000.png"),
    ("YUYV", "8_bag/00030.png"),
    ("UYVY", "8_bag/00030.png"),
    ("YVYU", "8_bag/00030.png"),
    ("NV12", "7_sneaker/00009.png"),
    ("NV21", "7_sneaker/00009.png"),
    ("YU12", "7_sneaker/00009.png"),
    ("GREY", "5_sandal/00008.png"),
    ("Y10", "5_sandal/00008.png"),
    ("Y16", "5_sandal/00008.png"),
]
JPEG_PICTURE = "1_trouser/00002.png"
# What is done to JPEG frames, those of webcams among them.
JPEG_CASES = ["whole", "without Huffman tables", "bytes after the end", "every other one cut off", "every other one empty"]
# Formats of the camera with several planes; NM12, NM21 and YM12 have each plane in a buffer of its own. With each the format
# of the first camera that has the same bytes in one plane.
PLANES = {"NV12": "NV12", "NM12": "NV12", "NM21": "NV21", "YM12": "YU12", "YUYV": "YUYV", "RGB3": "RGB3"}
# Frames whose bytes are compared.
TAKEN = 3
# What happens to that camera while the program runs: a control of vivid.
FAULTS = ["Inject Fatal Streaming Error", "Disconnect"]
# Meanwhile the clock is set years ahead, then years back.
CLOCK = "clock jumps"
# That camera is named so, unplugged, and plugged in again under this number.
LINK = "/dev/v4l/by-id/camera"
REPLUGS = [(LINK, 7), ("/dev/video7", 5)]


def raw_frame(picture, fourcc):
    """Bytes of an RGB picture in a pixel format; YUV is BT.601, limited range."""
    rgb = np.asarray(picture, np.float32)
    whole = rgb.astype(np.uint8)
    if fourcc == "RGB3":
        return whole.tobytes()
    if fourcc == "BGR3":
        return whole[..., ::-1].tobytes()
    if fourcc == "XR24":
        return np.dstack([whole[..., ::-1], np.zeros_like(whole[..., 0])]).tobytes()
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    grey = 0.299 * r + 0.587 * g + 0.114 * b
    if fourcc == "GREY":
        return grey.round().astype(np.uint8).tobytes()
    if fourcc in ("Y10", "Y16"):
        most = {"Y10": 1023, "Y16": 65535}[fourcc]
        return (grey * (most / 255)).round().astype("<u2").tobytes()
    y = (16 + grey * 219 / 255).round().astype(np.uint8)
    u = 128 + (b - grey) * (224 / 255 / 1.772)
    v = 128 + (r - grey) * (224 / 255 / 1.402)
    if fourcc in ("YUYV", "UYVY", "YVYU"):
        halves = {n: ((c[:, ::2] + c[:, 1::2]) / 2).round().astype(np.uint8) for n, c in (("U", u), ("V", v))}
        lumas = [y[:, ::2], y[:, 1::2]]
        samples = [lumas.pop(0) if letter == "Y" else halves[letter] for letter in fourcc]
        return np.stack(samples, axis=-1).tobytes()
    quarters = [c.reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean((1, 3)).round().astype(np.uint8) for c in (u, v)]
    if fourcc == "NV12":
        return y.tobytes() + np.stack(quarters, axis=-1).tobytes()
    if fourcc == "NV21":
        return y.tobytes() + np.stack(quarters[::-1], axis=-1).tobytes()
    if fourcc == "YU12":
        return y.tobytes() + quarters[0].tobytes() + quarters[1].tobytes()
    raise SystemExit(f"{fourcc}: no such pixel format here")


def jpeg_frames(picture):
    """The frames of each case of JPEG_CASES, as a camera would give them."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    whole = buffer.getvalue()
    bare, at = whole[:2], 2
    while at < len(whole):
        # a segment: marker, length with itself; after the start of the scan everything is picture
        marker, length = whole[at + 1], int.from_bytes(whole[at + 2 : at + 4], "big")
        end = len(whole) if marker == 0xDA else at + 2 + length
        bare += b"" if marker == 0xC4 else whole[at:end]
        at = end
    assert len(bare) < len(whole) - 400, "this JPEG had no Huffman tables"
    return dict(zip(JPEG_CASES, [[whole], [bare], [whole + bytes(5000)], [bare, whole[: len(whole) // 2]], [bare, b""]]))


def modules(kernel, name="vivid"):
    """A module and what it needs, in the order of loading; nothing where it is built in."""
    version = next((kernel / "lib" / "modules").iterdir()).name
    listing = subprocess.run(
        ["modprobe", "-d", kernel, "-S", version, "--show-depends", name], check=True, capture_output=True, text=True
    ).stdout
    paths = [line.split()[1] for line in listing.splitlines() if line.startswith("insmod")]
    return [Path(path) for path in dict.fromkeys(paths)]


def answer(line):
    """One frame's JSON line; the kernel may have written its own after it."""
    return json.JSONDecoder().raw_decode(line)[0]


def top_label(line):
    """First label of one frame's JSON line."""
    return answer(line)["top"][0]["label"]


def taking(name, uri):
    """Lines of the job that take frames as the program does; what `taken` reads."""
    return [f"echo @case bytes of {name}", f"timeout 30 /bin/feed take '{uri}' {TAKEN}", "echo @status $?"]


def taken(found, name):
    """Digests of the frames of a case, as they came."""
    section = found.get(f"bytes of {name}", NOTHING)
    frames = [line.split()[1:3] for line in section["lines"] if line.startswith("@frame ")]
    if section["status"] != 0 or len(frames) != TAKEN:
        return [f"{section['lines']} (status {section['status']})"]
    # to a reader that comes late v4l2loopback gives its first buffer whole, whatever was written to it
    late = name.startswith("MJPG") and int(frames[0][1]) == 4 * WIDTH * HEIGHT
    return [digest for digest, _ in frames[late:]]


def exact(found, name, sent):
    """What is wrong with the bytes of a case; those of every frame must be some of those that were sent."""
    want = {hashlib.sha256(frame).hexdigest() for frame in sent}
    return "" if set(taken(found, name)) <= want else f"bytes of {name}: {taken(found, name)}, sent were {want}"


def job(cases):
    """The guest's shell script: one section for each case between @case and @status lines."""
    pattern = "size=320x180&ctrl.osd_text_mode=2"
    once = "timeout 60 /bin/vedge-run model.onnx"
    lines = ["cd /data"]
    for device, fourcc in [("/dev/video0", "YUYV"), *(("/dev/video2", f) for f in PLANES)]:
        uri = f"{device}?format={fourcc}&{pattern}"
        lines += [f"echo @case pattern {device} {fourcc}", f"{once} '{uri}' --top 1 --max-frames 2", "echo @status $?"]
    for device, fourcc in [*(("/dev/video0", f) for f in sorted(set(PLANES.values()))), *(("/dev/video2", f) for f in PLANES)]:
        lines += taking(f"pattern {device} {fourcc}", f"{device}?format={fourcc}&{pattern}")
    uri = f"/dev/video2?{pattern}&ctrl.percentage_of_dropped_buffers=40"
    lines += ["echo @case losing frames", f"{once} '{uri}' --max-frames 12", "echo @status $?"]
    lines += ["echo @case wrong control", f"{once} '/dev/video2?ctrl.nonsense=1'", "echo @status $?"]
    uri = f"/dev/video2?{pattern}&ctrl.percentage_of_dropped_buffers=0"
    lines += [
        f"echo @case {CLOCK}",
        f"{once} '{uri}' --top 1 --max-frames 40 >/tmp/out 2>&1 &",
        "program=$!",
        "for i in $(seq 60); do [ $(grep -c seq /tmp/out) -ge 3 ] && break; sleep 0.2; done",
        "date -s '2031-01-01 00:00' >/dev/null; sleep 1; date -s '2001-01-01 00:00' >/dev/null",
        "wait $program; status=$?; cat /tmp/out; echo @status $status",
    ]
    for fault in FAULTS:
        lines += [
            f"echo @case {fault}",
            f"{once} '{uri}' --top 1 --max-frames 60 >/tmp/out 2>&1 &",
            "program=$!",
            "for i in $(seq 60); do [ $(grep -c seq /tmp/out) -ge 3 ] && break; sleep 0.2; done",
            f"/bin/feed set /dev/video2 '{fault}' 1",
            "wait $program; status=$?; cat /tmp/out; echo @status $status",
        ]
    for index, name in enumerate(JPEG_CASES):
        lines += [
            f"/bin/feed write /dev/video9 MJPG {WIDTH}x{HEIGHT} jpeg{index}.* >/tmp/feed 2>&1 &",
            "feeder=$!",
            "for i in 1 2 3 4 5 6 7 8 9 10; do grep -q feeding /tmp/feed && break; sleep 0.2; done",
            f"echo @case MJPG {name}",
            f"{once} '/dev/video9?format=MJPG&size={WIDTH}x{HEIGHT}' --top 1 --max-frames {2 * FRAMES} >/tmp/out 2>/tmp/err",
            "status=$?; cat /tmp/out /tmp/err; echo @status $status",
            *taking(f"MJPG {name}", f"/dev/video9?format=MJPG&size={WIDTH}x{HEIGHT}"),
            "sed 's/^/@feed /' /tmp/feed; kill $feeder; wait $feeder 2>/dev/null",
        ]
    for index, (fourcc, _, _) in enumerate(cases):
        uri = f"v4l2:///dev/video0?format={fourcc}&size={WIDTH}x{HEIGHT}"
        lines += [
            f"/bin/feed /dev/video1 /dev/video0 {fourcc} {WIDTH}x{HEIGHT} {index}.raw >/tmp/feed 2>&1 &",
            "feeder=$!",
            "for i in 1 2 3 4 5 6 7 8 9 10; do grep -q feeding /tmp/feed && break; sleep 0.2; done",
            f"echo @case {index}",
            f"timeout 60 /bin/vedge-run model.onnx '{uri}' --top 1 --max-frames {FRAMES}",
            "echo @status $?",
            *taking(index, uri),
            "sed 's/^/@feed /' /tmp/feed; kill $feeder; wait $feeder 2>/dev/null",
        ]
    # Unplugged for good: the nodes are gone, the driver is unloaded when the program has let go, and comes back with others.
    lines += [f"mkdir -p {Path(LINK).parent}; ln -s /dev/video2 {LINK}"]
    for name, number in REPLUGS:
        lines += [
            f"echo @case replug {name}",
            f"timeout 100 /bin/vedge-run model.onnx '{name}?{pattern}' --top 1 >/tmp/out 2>&1 &",
            "program=$!",
            "for i in $(seq 100); do [ $(grep -c seq /tmp/out) -ge 3 ] && break; sleep 0.2; done",
            f"node=$(readlink -f {name}); cp -a $node /tmp/node; rm -f {LINK} /dev/video*",
            "/bin/feed set /tmp/node Disconnect 1; rm /tmp/node",
            "for i in $(seq 100); do rmmod vivid 2>/dev/null && break; sleep 0.1; done",
            f"insmod /modules/vivid.ko $VIVID vid_cap_nr=20,{number}; ln -s /dev/video{number} {LINK}",
            "for i in $(seq 150); do sed '1,/, again$/d' /tmp/out | grep -q '^{' && break; sleep 0.2; done",
            "kill $program; wait $program; status=$?; cat /tmp/out; echo @status $status",
        ]
    return "\n".join(lines) + "\n"


def boot(cpu, kernel, image):
    """Console output of the machine; ends with its power-off."""
    command = ["qemu-system-aarch64", "-M", "virt", "-cpu", cpu, "-smp", "2", "-m", "512", "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-kernel", next((kernel / "boot").glob("vmlinuz-*"))]
    command += ["-initrd", image, "-append", "console=ttyAMA0 loglevel=1 panic=-1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=600)
    return (done.stdout + done.stderr).replace("\r", "")


def sections(console):
    """Lines and exit status of each case."""
    found, current = {}, None
    for line in console.splitlines():
        if line.startswith("@case "):
            current = found.setdefault(line.removeprefix("@case "), {"lines": [], "status": None})
        elif line.startswith("@status ") and current is not None:
            current["status"] = int(line.split()[1])
            current = None
        elif current is not None:
            current["lines"].append(line)
    return found


NOTHING = {"lines": [], "status": None}


def second_camera(found):
    """Each case of the camera with several planes, and what is wrong with it."""

    def best(name):
        lines = found.get(name, NOTHING)["lines"]
        answers = [answer(line)["top"][0] for line in lines if line.startswith("{")]
        return (answers[-1]["label"], answers[-1]["p"]) if len(answers) == 2 else None

    want = best("pattern /dev/video0 YUYV")
    for fourcc in PLANES:
        name = f"pattern /dev/video2 {fourcc}"
        got = best(name)
        same = want and got and want[0] == got[0] and abs(want[1] - got[1]) < 0.05
        told = any(f"/dev/video2 {fourcc} " in line for line in found.get(name, NOTHING)["lines"])
        yield name, "" if same and told else f"{got}, the first camera gives {want}; format shown: {told}"
        here, there = (set(taken(found, f"pattern {camera}")) for camera in (f"/dev/video2 {fourcc}", f"/dev/video0 {PLANES[fourcc]}"))
        yield f"bytes of {name}", "" if here == there and len(here) == 1 else f"{here}, the first camera gives {there}"
    losing = found.get("losing frames", NOTHING)
    dropped = sum(answer(line)["dropped"] for line in losing["lines"] if line.startswith("{"))
    yield "losing frames", "" if losing["status"] == 0 and dropped > 0 else f"status {losing['status']}, {dropped} dropped"
    wrong = found.get("wrong control", NOTHING)
    named = any("nonsense" in line and "error" in line for line in wrong["lines"])
    yield "wrong control", "" if wrong["status"] == 1 and named else f"status {wrong['status']}: {wrong['lines']}"
    section = found.get(CLOCK, NOTHING)
    answers = [answer(line) for line in section["lines"] if line.startswith("{")]
    years = {a["t"][:4] for a in answers}
    steady = all(0 < a["ms"]["latency"] < 5000 for a in answers) and not any("warning" in line for line in section["lines"])
    good = section["status"] == 0 and len(answers) == 40 and {"2031", "2001"} <= years and steady
    yield CLOCK, "" if good else f"status {section['status']}, {len(answers)} answers, years {years}, steady {steady}"
    for fault in FAULTS:
        section = found.get(fault, NOTHING)
        lost = any("trying again" in line for line in section["lines"])
        back = any(line.endswith(", again") for line in section["lines"])
        answers = sum(line.startswith("{") for line in section["lines"])
        good = section["status"] == 0 and lost and back and answers == 60
        odd = [line for line in section["lines"] if not line.startswith("{")]
        yield fault, "" if good else f"status {section['status']}, lost {lost}, back {back}, {answers} answers, {odd}"


def jpeg_camera(found, label, shots):
    """Each case of the camera that gives JPEG frames, and those of its bytes."""
    for name in JPEG_CASES:
        # the driver's empty frames are passed over where they are captured
        yield f"bytes of MJPG {name}", exact(found, f"MJPG {name}", [frame for frame in shots[name] if frame])
        section = found.get(f"MJPG {name}", NOTHING)
        answers = [answer(line) for line in section["lines"] if line.startswith("{")]
        right = len(answers) == 2 * FRAMES and {a["top"][0]["label"] for a in answers} == {label}
        dropped = sum(a["dropped"] for a in answers) > 0 or "every other one" not in name
        good = section["status"] == 0 and right and dropped
        yield f"MJPG {name}", "" if good else f"{section['lines']} (status {section['status']}), expected {label}"


def replugged(found):
    """Each case of the camera that comes back under another number."""
    for name, number in REPLUGS:
        section = found.get(f"replug {name}", NOTHING)
        path = LINK if name == LINK else f"/dev/video{number}"
        back = [i for i, line in enumerate(section["lines"]) if line.startswith(f"source: {path} ") and line.endswith(", again")]
        answers = sum(line.startswith("{") for line in section["lines"][back[0] :]) if back else 0
        good = section["status"] == 0 and answers > 0
        yield f"replug {name}", "" if good else f"status {section['status']}: {section['lines'][-6:]}"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("board", "feed", "host", "model"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cpu", default="cortex-a72")
    parser.add_argument("--work", type=Path, default=Path("target/vm"))
    args = parser.parse_args()

    subprocess.run([HERE / "fetch", args.work], check=True)
    frames = args.work / "frames"
    frames.mkdir(exist_ok=True)
    files = {"init": HERE / "init", "bin/busybox": args.work / "busybox" / "bin" / "busybox"}
    files |= {"bin/vedge-run": args.board, "bin/feed": args.feed, "data/model.onnx": args.model}
    cases = []
    for index, (fourcc, name) in enumerate(CASES):
        picture = Image.open(PICTURES / name).convert("RGB").resize((WIDTH, HEIGHT), Image.BILINEAR)
        still, raw = frames / f"{index}.png", frames / f"{index}.raw"
        picture.save(still)
        raw.write_bytes(raw_frame(picture, fourcc))
        files[f"data/{index}.raw"] = raw
        here = subprocess.run([args.host, args.model, still, "--top", "1"], check=True, capture_output=True, text=True)
        cases.append((fourcc, name, top_label(here.stdout.splitlines()[0])))

    picture = Image.open(PICTURES / JPEG_PICTURE).convert("RGB").resize((WIDTH, HEIGHT), Image.BILINEAR)
    shots_of = jpeg_frames(picture)
    for index, shots in enumerate(shots_of.values()):
        for number, data in enumerate(shots):
            path = frames / f"jpeg{index}.{number}"
            path.write_bytes(data)
            files[f"data/{path.name}"] = path

    subprocess.run([HERE / "loopback", args.work], check=True)
    loaded = [*modules(args.work / "kernel"), args.work / "loopback" / "v4l2loopback.ko"]
    files |= {f"modules/{path.name}": path for path in loaded}
    texts = {"modules/list": "".join(f"{path.name}\n" for path in loaded), "job": job(cases)}
    image = args.work / "initramfs.cpio.gz"
    image.write_bytes(initramfs(files, texts, links={"bin/sh": "busybox"}))

    start = time.time()
    console = boot(args.cpu, args.work / "kernel", image)
    (args.work / "console.log").write_text(console)
    found, failures = sections(console), 0
    for index, (fourcc, name, here) in enumerate(cases):
        section = found.get(str(index), NOTHING)
        labels = [top_label(line) for line in section["lines"] if line.startswith("{")]
        # A class folder is `<index>_<label>`; labels may be the folder's name or what follows the index.
        expected = name.split("/")[0]
        good = section["status"] == 0 and labels == [here] * FRAMES and here in (expected, expected.split("_", 1)[1])
        failures += not good
        print(f"{'ok    ' if good else 'FAILED'} {fourcc} {name}: {labels} (status {section['status']}), from a file: {here}")
        wrong = exact(found, str(index), [(frames / f"{index}.raw").read_bytes()])
        failures += bool(wrong)
        print(f"FAILED {wrong}" if wrong else f"ok     bytes of {fourcc} {name}")
    trousers = next(here for _, name, here in cases if name == JPEG_PICTURE)
    for name, problem in [*second_camera(found), *jpeg_camera(found, trousers, shots_of), *replugged(found)]:
        failures += bool(problem)
        print(f"FAILED {name}: {problem}" if problem else f"ok     {name}")
    if failures:
        print(f"\nconsole of the virtual machine ({args.work / 'console.log'}):\n{console[-4000:]}", file=sys.stderr)
        raise SystemExit(f"{failures} camera cases failed on {args.cpu}")
    print(f"{len(found)} camera cases on {args.cpu}: booted and done in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
