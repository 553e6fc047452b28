"""The report of a conversion in a real browser.

Usage: report.py --vedge VEDGE --out FOLDER     Needs chromium.

Converts a shipped model with `--report` and opens the page in headless Chromium, on a desk and on a phone: no complaints of the
browser, every section there with a size, nothing wider than the window, pictures decoded, a screenshot that is not blank. The
screenshots stay in FOLDER.
"""

import argparse
import functools
import http.server
import json
import re
import struct
import subprocess
import threading
import zlib
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "models"
# "float" only where layers were left in float.
SECTIONS = ["summary", "accuracy", "pictures", "cost", "layers", "ranges", "outliers", "tried", "float", "shift", "reproduce"]

# Opens the report in a frame as wide as a window and writes down what it finds. Without a script in the report itself.
PROBE = """<!doctype html><link rel="icon" href="data:,"><iframe id="f" src="report.html" style="border:0;width:%dpx;height:900px"></iframe><pre id="found"></pre><script>
const f = document.getElementById("f");
f.onload = () => {
  const d = f.contentDocument, box = e => e.getBoundingClientRect();
  document.getElementById("found").textContent = JSON.stringify({
    width: d.documentElement.scrollWidth,
    sections: [...d.querySelectorAll("section")].map(e => [e.id, Math.round(box(e).width), Math.round(box(e).height)]),
    images: [...d.images].map(i => i.naturalWidth),
    plots: [...d.querySelectorAll("svg")].filter(e => box(e).width > 0 && box(e).height > 0).length,
    scripts: d.scripts.length,
    title: d.title,
  });
};
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the folder, and keeps what was asked for."""

    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


def chromium(*args):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, f"the browser complains: {complaints}"
    return done.stdout


def pixels(path):
    """Width, height and the rows of a PNG of 8-bit RGB or RGBA."""
    data, at, parts, header = path.read_bytes(), 8, b"", None
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"IHDR":
            header = struct.unpack(">IIBB", data[at + 8 : at + 18])
        elif kind == b"IDAT":
            parts += data[at + 8 : at + 8 + length]
        at += length + 12
    width, height, depth, kind = header
    assert depth == 8 and kind in (2, 6), f"a PNG of kind {kind}, {depth} bits"
    raw, step = zlib.decompress(parts), (3 if kind == 2 else 4) * width + 1
    return width, height, [raw[y * step : (y + 1) * step] for y in range(height)]


def look(folder, url, width, sections):
    """What the browser makes of the page at a width."""
    (folder / "probe.html").write_text(PROBE % width)
    found = chromium("--window-size=1300,1000", "--virtual-time-budget=5000", "--dump-dom", f"{url}/probe.html")
    found = json.loads(re.search(r'<pre id="found">(\{.*\})</pre>', found)[1])
    assert found["width"] <= width, f"at {width} pixels the page is {found['width']} wide"
    assert [s[0] for s in found["sections"]] == sections, found["sections"]
    assert all(w > 0.9 * width - 60 or w > 1000 for _, w, _ in found["sections"]), found["sections"]
    assert all(h > 60 for _, _, h in found["sections"]), found["sections"]
    assert len(found["images"]) == 10 and min(found["images"]) > 0, found["images"]
    assert found["plots"] > 30 and found["scripts"] == 0, found
    return found


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    command = [args.vedge, "convert", MODELS / "mobilevit_nano.onnx", "-o", args.out / "report.onnx", "--calib", MODELS / "fashion/calibration"]
    command += ["--preprocess", MODELS / "fashion.json", "--calib-count", "64", "--report", args.out / "report.html"]
    command += ["--report-data", MODELS / "fashion/test"]
    done = subprocess.run([str(c) for c in [*command, "--json"]], check=True, capture_output=True)
    left_in_float = json.loads(done.stdout)["report"]["float_layers"]
    sections = [s for s in SECTIONS if s != "float" or left_in_float]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(args.out)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for width in (360, 1200):
        look(args.out, url, width, sections)
    for name, size in (("desk", "1200,1000"), ("phone", "500,900")):
        picture = (args.out / f"report.{name}.png").resolve()
        picture.unlink(missing_ok=True)
        chromium(f"--window-size={size}", f"--screenshot={picture}", f"{url}/report.html")
        width, height, rows = pixels(picture)
        assert len(set(rows)) > height / 3, f"{name}: a screenshot of {width}x{height} with {len(set(rows))} different rows"
    fetched = {path for path in Quiet.asked} - {"/probe.html", "/report.html"}
    assert not fetched, f"the page asks for {fetched}"
    print("the report: sections, pictures and plots are there at 360 and 1200 pixels, nothing is fetched")


if __name__ == "__main__":
    main()
