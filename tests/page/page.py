"""The live page in a real browser, and MQTT with a real broker, against one running stream.

Usage: page.py --run VEDGE_RUN --model MODEL.onnx     Needs chromium, mosquitto and mosquitto_sub.

Streams the shipped test pictures at ten a second. Headless Chromium opens the page as a phone and as a desk would: the state,
five classes with their bars, latencies, changes and the picture must be seen there, and nothing be wider than the window, long
labels either. A mosquitto broker with a password is stopped and started meanwhile: every
event that the program writes to its standard output must have come through it, the state must be retained, and the end told.
"""

import argparse
import json
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from browser import Browser

PICTURES = Path(__file__).resolve().parents[2] / "models" / "fashion" / "test"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def broker(work, port):
    """A mosquitto that lets the user `cam` in; it keeps what is retained over a restart."""
    passwords = work / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", passwords, "cam", "pass&word"], check=True)
    config = work / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\npassword_file {passwords}\nuser root\npersistence true\npersistence_location {work}/\n"
    )
    process = subprocess.Popen(["mosquitto", "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.7)
    return process


def subscribe(port, **options):
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(port), "-u", "cam", "-P", "pass&word", "-v", "-t", "#"]
    command += ["-q", "1", *options.pop("more", [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)


# What a phone's screen shows of the page, in its own pixels.
SHOWN = """(() => {
  const shown = e => { const b = e.getBoundingClientRect(); return e.checkVisibility() && b.width > 8 && b.height > 3 && b.left >= 0 && b.right <= innerWidth };
  const all = s => [...document.querySelectorAll(s)], graph = document.getElementById("graph");
  const drawn = graph.getContext("2d").getImageData(0, 0, graph.width, graph.height).data.some(v => v > 0);
  return {
    state: document.getElementById("state").textContent,
    times: document.getElementById("times").textContent,
    shares: all(".class i").map(e => parseFloat(e.style.getPropertyValue("--p"))),
    changes: all("#changes li").length,
    picture: document.getElementById("picture").naturalWidth,
    link: document.getElementById("link").textContent,
    hidden: ["#state", "#link", "#picture", "#graph", "#times", "#changes", "#changes li", ".class b", ".class span", ".class i"]
      .filter(s => !all(s).length || !all(s).every(shown)),
    drawn, wide: document.scrollingElement.scrollWidth - innerWidth, width: innerWidth };
})()"""
# A label of ImageNet and one without a blank, as the state and as a class.
LONG = """show({state: "L".repeat(90), top: [{label: "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias", p: 1},
  {label: "L".repeat(90), p: 0}], ms: {latency: 12345.6, infer: 12345.6}, dropped: 1e9})"""


def check_page(url, width, height):
    """The page in a window of that size; the state that it shows."""
    with Browser(width, height) as browser:
        browser.open(url)
        for _ in range(60):
            time.sleep(0.25)
            found = browser.evaluate(SHOWN)
            if found["changes"] > 2 and found["picture"] and found["link"] == "live" and " frames a second" in found["times"]:
                break
        where = f"in a window of {width}x{height}: {found}"
        assert found["width"] == width and found["wide"] <= 0, f"the page is wider than the window {where}"
        assert not found["hidden"], f"not to be seen {where}"
        assert found["state"] not in ("", "…") and found["drawn"] and found["picture"] and found["changes"] > 2, where
        assert len(found["shares"]) == 5 and 0 < sum(found["shares"]) <= 100.1, f"classes {where}"
        assert re.search(r"[0-9.]+ ms median.*frames a second", found["times"]), f"no latencies {where}"
        long = browser.evaluate(f"{LONG}; ({SHOWN})")
        # a phone's browser zooms out to show what is too wide
        assert (long["width"], long["wide"]) <= (width, 0) and long["state"].startswith("LLL"), f"long labels widen the page {where}: {long}"
        assert not browser.complaints, browser.complaints
        return found["state"]


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "password").write_text("pass&word\n")
        http, mqtt = free_port(), free_port()
        server = broker(work, mqtt)
        listener = subscribe(mqtt, more=["-i", "listener", "-c"])
        time.sleep(0.3)
        command = [args.run, args.model, f"file://{PICTURES}/?fps=10&repeat=yes", "--lines", "events", "--smooth", "0"]
        command += ["--threads", "1", "--http", f"127.0.0.1:{http}", "--mqtt", f"mqtt://cam@127.0.0.1:{mqtt}/test/cam"]
        command += ["--mqtt-password", work / "password"]
        stream = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            time.sleep(2)
            url = f"http://127.0.0.1:{http}"
            for width, height in ((360, 740), (1280, 800)):
                print(f"page of {width}x{height} shows", check_page(url, width, height))
            jpeg = urllib.request.urlopen(f"{url}/snapshot.jpg", timeout=5).read()
            assert jpeg[:2] == b"\xff\xd8" and jpeg[-2:] == b"\xff\xd9", "the snapshot is no JPEG"
            server.terminate()
            server.wait()
            time.sleep(2)
            server = broker(work, mqtt)
            time.sleep(4)
            stream.send_signal(signal.SIGTERM)
            lines, told = stream.communicate(timeout=20)
            assert stream.returncode == 0, told
            time.sleep(1)
            late = subscribe(mqtt, more=["-W", "2"]).communicate()[0]
            listener.terminate()
            heard = listener.communicate()[0] + late
        finally:
            for process in (stream, server, listener):
                process.kill()
        events = [json.loads(line) for line in lines.splitlines()]
        missing = [e for e in events if f'"seq":{e["seq"]},"event":"{e["event"]}"' not in heard]
        assert len(events) > 10 and not missing, f"{len(missing)} of {len(events)} events did not come: {missing[:3]}\n{told}"
        assert "trying again" in told and "connected again" in told, told
        for want in ("test/cam/availability online", "test/cam/availability offline", "homeassistant/sensor/vedge-test-cam/config {"):
            assert want in heard, f"{want!r} was not heard:\n{heard[-2000:]}"
        assert "test/cam/state " in late and "test/cam/availability offline" in late, f"not retained: {late}"
        print(f"{len(events)} events, none lost while the broker was away")


if __name__ == "__main__":
    main()
