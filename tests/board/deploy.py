"""`vedge bundle` and `vedge deploy` against a real sshd on this machine, with everything that goes wrong on the way.

Usage: deploy.py --vedge VEDGE --run VEDGE_RUN --model MODEL.onnx --work DIR [--arm BOARD_VEDGE_RUN]

The board is this machine: a key of its own, a port of its own, and a systemctl of ours that runs the service's command
(tests/board/systemctl), since there is no systemd in a container. Needs sshd, ssh and root (sshd is started here).
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Board:
    """A running sshd whose logins see our systemctl first."""

    def __init__(self, work):
        self.work = work
        self.root = work / "opt" / "vedge"
        self.state = work / "systemd"
        self.bin = work / "bin"
        self.bin.mkdir(parents=True)
        os.symlink(HERE / "systemctl", self.bin / "systemctl")
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name], check=True)
        shutil.copy(work / "user.pub", work / "authorized")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (work / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {work}/host\nAuthorizedKeysFile {work}/authorized\n"
            f"StrictModes no\nUsePAM no\nPidFile {work}/sshd.pid\nPermitRootLogin yes\n"
            f"SetEnv PATH={self.bin}:/usr/sbin:/usr/bin:/sbin:/bin VEDGE_FAKE_SYSTEMD={self.state}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        self.sshd = None
        self.start()
        known = f"-o UserKnownHostsFile={work}/known -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        self.ssh = f"ssh -p {self.port} -i {work}/user {known}"

    def start(self):
        self.sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", self.work / "sshd_config"], stderr=subprocess.DEVNULL)
        for _ in range(50):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise SystemExit("sshd does not listen")

    def stop(self):
        self.sshd.terminate()
        self.sshd.wait()

    def current(self):
        link = self.root / "vedge" / "current"
        return os.readlink(link).removeprefix("releases/") if link.is_symlink() else None

    def pid(self):
        """Process of the running service, None when it does not run."""
        try:
            pid = int((self.state / "vedge.pid").read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        return pid if state != "Z" else None

    def answers(self):
        log = self.state / "vedge.log"
        return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")] if log.exists() else []


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "run", "model", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--arm", type=Path)
    args = parser.parse_args()
    vedge, run, model = args.vedge.resolve(), args.run.resolve(), args.model.resolve()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    begun = time.time()
    # The fake systemd stands for a real one to the probe.
    systemd = Path("/run/systemd/system")
    made = not systemd.is_dir()
    systemd.mkdir(parents=True, exist_ok=True)
    board = Board(work)
    try:
        count = cases(vedge, run, model, work, board, args.arm)
    finally:
        board.stop()
        if pid := board.pid():
            os.kill(pid, signal.SIGTERM)
        if made:
            systemd.rmdir()
    print(f"{count} passed, 0 failed\ndeployment over ssh: {count} cases in {time.time() - begun:.0f} s")


def cases(vedge, run, model, work, board, arm):
    done = 0

    def passed(what):
        nonlocal done
        done += 1
        print(f"ok     {what}", flush=True)

    def bundle(name, *more, binary=run, of=model, board_name="generic-x86-64", expect=0):
        out = work / name
        line = [vedge, "bundle", of, "--board", board_name, "--program", binary, "-o", out, *more]
        result = subprocess.run(line, capture_output=True, text=True)
        assert result.returncode == expect, f"{line}: {result.returncode}\n{result.stdout}{result.stderr}"
        return out if expect == 0 else result.stderr

    def deploy(what, *more, expect=0, ssh=None, host="root@127.0.0.1"):
        line = [vedge, "deploy", what, host, "--root", board.root, "--settle", "1", "--ssh", ssh or board.ssh, *more]
        result = subprocess.run([str(word) for word in line], capture_output=True, text=True)
        assert result.returncode == expect, f"{line}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    def version(folder):
        return json.loads((folder / "manifest.json").read_text())["version"]

    def keeps(release, pid, what):
        assert board.current() == release, f"{what}: {board.current()} is in use, not {release}"
        assert board.pid(), f"{what}: the old service does not run"
        if pid:
            assert board.pid() == pid, f"{what}: the old service was restarted"

    source = ["--source", "synthetic://", "--options", "--top 1"]
    first = bundle("first", *source)
    for kind in (".tar.gz", ".deb"):
        one, two = bundle(f"a{kind}", *source), bundle(f"b{kind}", *source)
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two)}
        assert len(digests) == 1, f"two bundles {kind} differ"
    passed("two bundles of the same parts are the same, byte for byte")

    error = bundle("no", "--memory", "64", expect=2)
    assert "MiB at its peak" in error and "of 64 MiB Linux has some 51" in error, error
    passed("a model that cannot fit is refused with the numbers")

    error = bundle("no", board_name="pi5", expect=2)
    assert "the program is for x86_64, the target aarch64" in error, error
    passed("a program for another machine is refused")

    assert "can be deployed; nothing was changed" in deploy(first, "--dry-run")
    assert not board.root.exists()
    passed("--dry-run changes nothing")

    deploy(first)
    keeps(version(first), None, "first release")
    for _ in range(50):
        if board.answers():
            break
        time.sleep(0.1)
    assert board.answers()[0]["top"][0]["label"], "the service writes no answers"
    passed("the first release runs and answers")

    old, pid = version(first), board.pid()
    second = bundle("second", "--source", "synthetic://", "--options", "--top 2")
    assert version(second) != old
    if arm:
        for_arm = bundle("arm", binary=arm.resolve(), board_name="pi5")
        assert "is a x86_64 machine, the bundle is for aarch64" in deploy(for_arm, expect=1)
        keeps(old, pid, "wrong architecture")
        passed("wrong architecture: the old release goes on")

    damaged = work / "damaged"
    shutil.copytree(second, damaged)
    with open(damaged / "model.onnx", "r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    assert "not what was packed" in deploy(damaged, expect=1)
    keeps(old, pid, "damaged files")
    passed("damaged on the way: the old release goes on")

    # A program whose self-test fails.
    failing = work / "failing"
    liar = work / "liar"
    liar.write_text('#!/bin/sh\ncase $1 in doctor) echo "BAD   self-test    cosine 0.1"; exit 1 ;; esac\nexit 0\n')
    repack(second, failing, liar)
    text = deploy(failing, expect=1)
    assert "fails its self-test" in text and "BAD   self-test" in text, text
    keeps(old, None, "failing self-test")
    assert not (board.root / "vedge" / "releases" / version(failing)).exists()
    passed("failing self-test: the old release runs again")

    dying = work / "dying"
    liar.write_text('#!/bin/sh\ncase $1 in doctor | verify) exit 0 ;; esac\nsleep 0.2; exit 1\n')
    repack(second, dying, liar)
    assert "does not stay up" in deploy(dying, expect=1)
    keeps(old, None, "a service that dies")
    passed("a service that does not stay up: the old release runs again")

    # A link that breaks: ssh ends itself after a part of the files.
    pid = board.pid()
    breaking = work / "breaking"
    breaking.write_text(
        f'#!/bin/sh\ncase "$*" in *model.onnx*) head -c 300000 | {board.ssh} "$@"; exit 255 ;; esac\nexec {board.ssh} "$@"\n'
    )
    breaking.chmod(0o755)
    rsync = shutil.which("rsync")
    path = os.environ["PATH"]
    if rsync:  # the way without rsync first
        os.environ["PATH"] = str(without(work, "rsync"))
    text = deploy(second, expect=1, ssh=str(breaking))
    assert "the connection to root@127.0.0.1 failed or broke" in text, text
    keeps(old, pid, "broken link")
    part = board.root / "vedge" / "incoming" / version(second) / "model.onnx"
    arrived = part.stat().st_size
    assert 0 < arrived < (second / "model.onnx").stat().st_size, arrived
    passed(f"a link that breaks after {arrived} bytes: the old release goes on")

    deploy(second)
    os.environ["PATH"] = path
    keeps(version(second), None, "resumed")
    passed("the same command goes on where it stopped")

    # A full disk: a small file system.
    small = work / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode == 0:
        try:
            text = refuse_small(vedge, first, small, board)
            assert "KiB are free" in text, text
        finally:
            subprocess.run(["umount", small], check=True)
        keeps(version(second), None, "full disk")
        passed("a full disk is seen before anything is copied")
    else:
        print("skip   a full disk: no right to mount here")

    out = subprocess.run(
        [vedge, "deploy", "--roll-back", "root@127.0.0.1", "--root", board.root, "--ssh", board.ssh],
        capture_output=True, text=True,
    )
    assert out.returncode == 0, out.stderr
    keeps(old, None, "--roll-back")
    passed("--roll-back: the release before")

    if shutil.which("minisign"):
        signed(vedge, run, work, bundle, source)
        passed("signatures: the right key, none, another key, changed files")
    else:
        print("skip   signatures: minisign is not installed")

    record = work / "record.md"
    line = [vedge, "bench", model, "--on", "root@127.0.0.1", "--ssh", board.ssh, "--program", run, "--runs", "3", "--record", record]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"| {model.name} | " in record.read_text() and "kernels" in record.read_text(), record.read_text()
    passed("bench --on brings the record back")
    # Below 200 °C at once where there is a sensor; without one the board says so.
    result = subprocess.run([*line[:-2], "--cool-down", "200"], capture_output=True, text=True)
    assert result.returncode == 0 or "this machine tells no temperature" in result.stderr, result.stderr
    passed("bench --on takes --cool-down there")

    error = deploy(first, expect=1, host="nobody-at-all@127.0.0.1")
    assert "failed or broke" in error
    passed("a login that fails is said so")
    return done


def refuse_small(vedge, bundle, small, board):
    line = [vedge, "deploy", bundle, "root@127.0.0.1", "--root", small / "vedge", "--ssh", board.ssh]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert not any(small.iterdir()), "something was copied"
    return result.stderr


def repack(bundle, to, program):
    """A bundle with another program, with the right checksums and a version of its own."""
    shutil.copytree(bundle, to)
    shutil.copy(program, to / "vedge-run")
    (to / "vedge-run").chmod(0o755)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["version"] += f".{to.name}"
    (to / "manifest.json").write_text(json.dumps(manifest))
    names = [line.split()[1] for line in (to / "SHA256SUMS").read_text().splitlines()]
    sums = [f"{hashlib.sha256((to / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (to / "SHA256SUMS").write_text("".join(sums))


def without(work, name):
    """A folder with links to every program but one."""
    folder = work / f"without-{name}"
    folder.mkdir(exist_ok=True)
    for place in os.environ["PATH"].split(":"):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            link = folder / program.name
            if program.name != name and not link.exists():
                link.symlink_to(program)
    return folder


def signed(vedge, run, work, bundle, source):
    """`vedge bundle --sign` and `vedge-run verify --key`."""
    for name in ("mine", "other"):
        subprocess.run(["minisign", "-G", "-W", "-p", work / f"{name}.pub", "-s", work / f"{name}.key"], check=True,
                       capture_output=True)

    def verify(folder, key):
        return subprocess.run([run, "verify", folder, "--key", work / key], capture_output=True, text=True)

    one = bundle("signed", "--sign", work / "mine.key", *source)
    two = bundle("signed2", "--sign", work / "mine.key", *source)
    assert (one / "SHA256SUMS.minisig").read_bytes() == (two / "SHA256SUMS.minisig").read_bytes()
    assert verify(one, "mine.pub").returncode == 0
    result = verify(one, "other.pub")
    assert result.returncode == 1 and "is not signed by the key" in result.stderr, result.stderr
    (two / "SHA256SUMS.minisig").unlink()
    result = verify(two, "mine.pub")
    assert result.returncode == 1 and "is not signed, and this board trusts only" in result.stderr, result.stderr
    (one / "vedge.conf").write_text("SOURCE=synthetic://\nOPTIONS=\n")
    result = verify(one, "mine.pub")
    assert result.returncode == 1 and "vedge.conf is not the file that was packed" in result.stderr, result.stderr


if __name__ == "__main__":
    main()
