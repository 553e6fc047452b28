"""The live page in a real browser, and MQTT with a real broker, against one running stream.

Usage: page.py --run VEDGE_RUN --model MODEL.onnx     Needs chromium, mosquitto and mosquitto_sub.

Streams the shipped test pictures at ten a second. Headless Chromium opens the page as a phone would; what it made of it must
hold a state, five classes, latencies and changes. A mosquitto broker with a password is stopped and started meanwhile: every
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


def dom(url):
    """The page as it is after five seconds in a small window."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--timeout=5000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def check_page(url):
    page = re.sub(r"<script>.*?</script>", "", dom(url), flags=re.S)
    state = re.search(r'id="state">([^<]*)<', page)
    assert state and state[1] not in ("", "…"), "the page shows no state"
    shares = re.findall(r"--p: ?([0-9.]+)%", page)
    assert len(shares) == 5 and 0 < sum(map(float, shares)) <= 100.1, f"classes: {shares}"
    assert re.search(r"[0-9.]+ ms median.*frames a second", page), "no latencies"
    return state[1]


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
            print("page shows", check_page(url))
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
