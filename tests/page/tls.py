"""MQTT over TLS with a real broker: certificates of an authority that is named, of another one, and for another host.

Usage: tls.py --run VEDGE_RUN --plain VEDGE_RUN --model MODEL.onnx     Needs mosquitto, mosquitto_sub and openssl.

`--run` was built with the feature `tls`, `--plain` without. A mosquitto that speaks TLS only has a certificate for 127.0.0.1.
With its authority events come through, with name and password; with another authority, or by a name that the certificate does
not have, nothing is sent, the program says why and goes on; the program without TLS refuses the address.
"""

import argparse
import json
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[2] / "models" / "fashion" / "test"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def openssl(*words, cwd):
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True)


def certificates(work):
    """Two authorities, and a certificate of the first one for 127.0.0.1."""
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("ca", "other"):
        openssl("req", "-x509", *curve, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}", cwd=work)
    openssl("req", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=broker", cwd=work)
    (work / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san"]
    openssl("x509", "-req", "-in", "server.csr", *sign, "-out", "server.pem", cwd=work)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("run", "plain", "model"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, port = Path(folder), free_port()
        certificates(work)
        (work / "password").write_text("pass&word\n")
        passwords = work / "passwords"
        passwords.touch(mode=0o600)
        subprocess.run(["mosquitto_passwd", "-b", passwords, "cam", "pass&word"], check=True)
        (work / "conf").write_text(
            f"listener {port} 127.0.0.1\npassword_file {passwords}\nuser root\n"
            f"certfile {work}/server.pem\nkeyfile {work}/server.key\n"
        )
        server = subprocess.Popen(["mosquitto", "-c", work / "conf"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.7)
        listen = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(port), "-u", "cam", "-P", "pass&word", "--cafile", work / "ca.pem"]
        listener = subprocess.Popen([*listen, "-v", "-t", "#"], stdout=subprocess.PIPE, text=True)
        time.sleep(0.3)

        def stream(program, host, authority):
            command = [program, args.model, f"file://{PICTURES}/?fps=20&repeat=yes", "--lines", "events", "--smooth", "0"]
            command += ["--threads", "1", "--mqtt", f"mqtts://cam@{host}:{port}/tls", "--mqtt-password", work / "password"]
            command += ["--mqtt-ca", work / authority] if authority else []
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(3)
            process.send_signal(signal.SIGTERM)
            lines, told = process.communicate(timeout=20)
            return process.returncode, [json.loads(line) for line in lines.splitlines()], told

        try:
            status, events, told = stream(args.run, "127.0.0.1", "ca.pem")
            assert status == 0 and len(events) > 5 and "trying again" not in told, told
            for host, authority, why in (("127.0.0.1", "other.pem", "UnknownIssuer"), ("localhost", "ca.pem", "not valid for name"), ("127.0.0.1", None, "UnknownIssuer")):
                status, seen, told = stream(args.run, host, authority)
                assert status == 0 and len(seen) > 5 and "trying again" in told and why in told, f"{host}, {authority}: {told}"
                print(f"refused {host} with {authority}: {next(line for line in told.splitlines() if 'trying again' in line)}")
            status, _, told = stream(args.plain, "127.0.0.1", "ca.pem")
            assert status == 2 and "built without TLS" in told and "--tls" in told, f"{status}: {told}"
            time.sleep(0.5)
        finally:
            listener.terminate()
            heard = listener.communicate()[0]
            server.kill()
        missing = [e for e in events if f'"seq":{e["seq"]},"event":"{e["event"]}"' not in heard]
        assert not missing, f"{len(missing)} of {len(events)} events did not come: {missing[:3]}"
        assert heard.count("tls/availability online") == 1, "somebody else came in"
        print(f"{len(events)} events over TLS")


if __name__ == "__main__":
    main()
