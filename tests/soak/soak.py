#!/usr/bin/env python3
"""A long run with a plan of faults: a stream of JPEG pictures whose source cuts them off, writes rubbish, falls silent and
dies, and clients that stop reading. Prints a record for tests/records/soak.md; fails where something is lost or leaks.

    soak.py --run VEDGE_RUN --model MODEL.onnx [--frames 100000]

The model is one of the shipped ones. The source, this same script, sends the 200 shipped test pictures over and over. Checked:
every frame that came is in the counters (answered, dropped or damaged), answers are those of the pictures alone, the resident
memory of the last tenth of the run is that of the second tenth within 5 %, no thread and no file is left open, and the program
ends with status 0 when it is told to.
"""

import argparse
import collections
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[2] / "models" / "fashion" / "test"
# After so many frames, again and again, the source ...
CUT, RUBBISH, SILENCE, DEATH = 500, 1_700, 20_000, 9_000
SECONDS = 0.001


def feed(state):
    """The source: goes on where the one before it died; `state` keeps how many frames were sent whole."""
    from io import BytesIO

    from PIL import Image

    jpegs = []
    for path in sorted(PICTURES.glob("*/*.png")):
        out = BytesIO()
        Image.open(path).convert("RGB").resize((64, 64)).save(out, "JPEG", quality=92)
        jpegs.append(out.getvalue())
    sent = int(state.read_text()) if state.exists() else 0
    out = sys.stdout.buffer
    for n in itertools.count(sent + 1):
        picture = jpegs[n % len(jpegs)]
        if n % CUT == 0:
            out.write(picture[: len(picture) // 2])
        if n % RUBBISH == 0:
            out.write(bytes(i * 7919 % 251 for i in range(5000)))
        out.write(picture)
        out.flush()
        if n % SILENCE == 0:
            time.sleep(17)
        if n % DEATH == 0:
            state.write_text(str(n))
            os._exit(3)
        if n % 100 == 0:
            state.write_text(str(n))
        time.sleep(SECONDS)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metrics(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {k: float(v) for k, v in re.findall(r"^vedge_(\w+) ([-+.0-9e]+)$", text, re.M)}


def sample(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    rss, threads = (int(re.search(rf"^{k}:\s+(\d+)", status, re.M)[1]) for k in ("VmRSS", "Threads"))
    return rss / 1024, threads, len(os.listdir(f"/proc/{pid}/fd"))


def main():
    if sys.argv[1:2] == ["--feed"]:
        try:
            return feed(Path(sys.argv[2]))
        except BrokenPipeError:
            os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__.replace('%', '%%'), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=100_000)
    args = parser.parse_args()
    state = Path(f"/tmp/vedge-soak.{os.getpid()}")
    source = f"exec:{shlex.quote(sys.executable)} {shlex.quote(os.path.abspath(__file__))} --feed {state}"
    port = free_port()
    command = [args.run.resolve(), args.model, source, "--http", f"127.0.0.1:{port}", "--threads", "1"]
    started = time.time()
    program = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    answers, said = collections.Counter(), collections.Counter()

    def read():
        for line in program.stdout:
            a = json.loads(line)
            answers["lines"] += 1
            answers["dropped at a sink"] += a.get("lost", 0)
            if answers["lines"] % 10_000 == 0:
                time.sleep(3)

    def listen():
        for line in program.stderr:
            said[re.sub(r"[0-9]+(\.[0-9]+)?", "N", line.strip())[:150]] += 1

    readers = [threading.Thread(target=f, daemon=True) for f in (read, listen)]
    for r in readers:
        r.start()
    time.sleep(3)
    # Clients that ask for the stream and for events and never read them.
    idle = []
    for path in ("/stream", "/events"):
        s = socket.create_connection(("127.0.0.1", port))
        s.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        idle.append(s)
    samples = []
    while program.poll() is None:
        time.sleep(1)
        sent = int(state.read_text() or 0) if state.exists() else 0
        samples.append((sent, *sample(program.pid)))
        if sent >= args.frames:
            break
    counted = metrics(port)
    open_files = sample(program.pid)
    program.send_signal(signal.SIGTERM)
    status = program.wait(30)
    for r in readers:
        r.join(10)
    tenth = max(1, len(samples) // 10)
    median = lambda part: sorted(s[1] for s in part)[len(part) // 2]
    early, late = median(samples[tenth : 2 * tenth]), median(samples[-tenth:])
    print(f"Measured {datetime.date.today()}, {platform.machine()}, {time.time() - started:.0f} s, {samples[-1][0]} frames sent.\n")
    print(f"- status {status}; {answers['lines']} lines written")
    for name, value in sorted(counted.items()):
        print(f"- {name}: {value:g}")
    print(f"- resident memory: {early:.1f} MiB in the second tenth, {late:.1f} MiB in the last; threads {samples[0][2]} to {open_files[1]}, files {samples[0][3]} to {open_files[2]}")
    print("- said on standard error (numbers as N):")
    for line, count in said.most_common(12):
        print(f"  - {count} times: {line}")
    state.unlink(missing_ok=True)
    assert status == 0, f"status {status}"
    assert samples[-1][0] >= args.frames, f"it ended after {samples[-1][0]} frames"
    seen = counted["answers_total"] + counted["frames_dropped_total"]
    assert 0.995 * args.frames <= seen, f"{seen:g} frames are counted"
    assert abs(late - early) < 0.05 * early, f"memory went from {early:.1f} to {late:.1f} MiB"
    assert open_files[2] <= samples[0][3] + 4 and open_files[1] <= samples[0][2] + 4, "threads or files are left"


if __name__ == "__main__":
    main()
