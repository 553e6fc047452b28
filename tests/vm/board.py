"""A board from the first deployment to a failed upgrade, in an arm64 virtual machine with Debian, systemd and a camera.

Usage: board.py --vedge VEDGE --board VEDGE_RUN --feed FEED --host VEDGE_RUN --model MODEL.onnx [--work target/vm] [--memory 512]
  [--large MODEL.onnx]

The machine has a disk, udev, ssh (dropbear) and the kernel's virtual camera, which shows one known picture. In it:
deploy over ssh, the service answers with the picture's label, reboot and it still does, systemd starts it again when it
hangs, an upgrade that fails its self-test is rolled back, a Debian package installs without its camera, answers when that
comes, and purges without a trace. With --large a second model runs on the camera in a control group of LARGE_MIB.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from initramfs import initramfs
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "board"))
from deploy import repack  # noqa: E402
from run import HEIGHT, PICTURES, WIDTH, modules, raw_frame, top_label  # noqa: E402

# systemd takes the service for hung after so many seconds, here; the unit's own setting is compared with UNIT.
WATCHDOG = 8
UNIT = {"Type": "notify", "WatchdogUSec": "30s", "DevicePolicy": "closed", "NoNewPrivileges": "yes", "ProtectSystem": "strict"}
LARGE_MIB = 128
PICTURE = "1_trouser/00002.png"
DRIVERS = ["virtio_pci", "virtio_mmio", "virtio_blk", "ext4", "virtio_net", "vivid"]


class Machine:
    """A virtual machine that is started again after a reboot, on the same disk."""

    def __init__(self, args, disk, image, key):
        self.args, self.disk, self.image = args, disk, image
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        known = f"-o UserKnownHostsFile={args.work}/known -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        self.ssh = f"ssh -p {self.port} -i {key} {known}"
        self.log = open(args.work / "board.log", "wb")
        self.process = None

    def start(self):
        """Boots; returns the seconds until ssh answers."""
        a = self.args
        kernel = next((a.work / "kernel" / "boot").glob("vmlinuz-*"))
        command = ["qemu-system-aarch64", "-M", "virt", "-cpu", a.cpu, "-smp", "2", "-m", str(a.memory), "-nodefaults"]
        command += ["-no-reboot", "-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", self.image]
        command += ["-append", "console=ttyAMA0 panic=-1 systemd.show_status=false systemd.journald.forward_to_console=1"]
        command += ["-drive", f"file={self.disk},format=raw,if=none,id=disk,cache=unsafe", "-device", "virtio-blk-pci,drive=disk"]
        command += ["-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=net,romfile="]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        begun = time.time()
        while time.time() - begun < 600:
            if self.process.poll() is not None:
                break
            if self.run("true", check=False, timeout=20).returncode == 0:
                return time.time() - begun
            time.sleep(1)
        raise SystemExit(f"the virtual machine does not answer over ssh: see {self.args.work / 'board.log'}")

    def run(self, command, check=True, timeout=120):
        line = [*self.ssh.split(), "-o", "ConnectTimeout=10", "root@127.0.0.1", command]
        try:
            result = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            result = subprocess.CompletedProcess(line, 255, "", "timeout")
        assert not check or result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def shows(self, unit):
        """What systemd knows of a service."""
        names = ["MainPID", "NRestarts", "ActiveState", "StatusText", *UNIT]
        lines = self.run(f"systemctl show {unit} " + " ".join(f"-p {name}" for name in names)).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def labels(self, unit):
        """Labels of the last answers in the journal, of this boot."""
        text = self.run(f"journalctl -b -o cat -n 50 -u {unit}").stdout
        return [top_label(line) for line in text.splitlines() if line.startswith("{")]

    def answers(self, unit, label):
        """Waits until the service has answered three times; all answers must be right."""
        for _ in range(40):
            found = self.labels(unit)
            if len(found) >= 3:
                assert set(found) == {label}, f"{unit} answers {found}, expected {label}"
                return
            time.sleep(1)
        raise SystemExit(f"{unit} does not answer:\n{self.run(f'systemctl status --no-pager -n 20 {unit}', check=False).stdout}")


def disk(args, key, raw):
    """A disk image with the system, the feeder of the camera and the key."""
    subprocess.run([HERE / "rootfs", args.work], check=True)
    root = args.work / "rootfs.now"
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", args.work / "rootfs", root], check=True)
    shutil.copy(f"{key}.pub", root / "root/.ssh/authorized_keys")
    (root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(args.feed, root / "usr/local/bin/feed")
    (root / "frame.raw").write_bytes(raw)
    unit = f"[Service]\nExecStart=/usr/local/bin/feed /dev/video1 /dev/video0 RGB3 {WIDTH}x{HEIGHT} /frame.raw\nRestart=always\nRestartSec=1\n"
    (root / "etc/systemd/system/feed.service").write_text(unit)
    (root / "etc/systemd/system/multi-user.target.wants/feed.service").symlink_to("/etc/systemd/system/feed.service")
    image = args.work / "disk.img"
    image.unlink(missing_ok=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, image, "600M"], check=True)
    shutil.rmtree(root)
    return image


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "board", "feed", "host", "model"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--cpu", default="cortex-a72")
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("target/vm"))
    args = parser.parse_args()
    args.work = args.work.resolve()
    begun = time.time()
    subprocess.run([HERE / "fetch", args.work], check=True)
    for path in [*args.work.glob("key*"), args.work / "known"]:
        path.unlink(missing_ok=True)
    key = args.work / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    picture = Image.open(PICTURES / PICTURE).convert("RGB").resize((WIDTH, HEIGHT), Image.BILINEAR)
    picture.save(args.work / "still.png")
    here = subprocess.run([args.host, args.model, args.work / "still.png", "--top", "1"], check=True, capture_output=True, text=True)
    label = top_label(here.stdout.splitlines()[0])
    loaded = [p for d in DRIVERS for p in modules(args.work / "kernel", d)]
    loaded = list(dict.fromkeys(loaded))
    files = {"init": HERE / "init-disk", "bin/busybox": args.work / "busybox" / "bin" / "busybox"}
    files |= {f"modules/{path.name}": path for path in loaded}
    image = args.work / "board.cpio.gz"
    image.write_bytes(initramfs(files, {"modules/list": "".join(f"{p.name}\n" for p in loaded)}, links={"bin/sh": "busybox"}))
    machine = Machine(args, disk(args, key, raw_frame(picture, "RGB3")), image, key)
    try:
        count = cases(args, machine, label)
    except BaseException:
        print((args.work / "board.log").read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        machine.stop()
    print(f"{count} passed, 0 failed\nthe board's life in {args.memory} MiB on {args.cpu}: {time.time() - begun:.0f} s")


def large(args, machine, work, source):
    """A large model, which vedge bundles for the smallest Raspberry Pi, on the camera with little memory."""
    line = [args.vedge, "bundle", args.large, "--board", "raspberry-pi-zero-2-w", "--program", args.board, "-o", work / "large", *source]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in ("vedge-run", "model.onnx"):
        with open(work / "large" / name, "rb") as file:
            subprocess.run([*machine.ssh.split(), "root@127.0.0.1", f"cat >/root/{name}; chmod 755 /root/{name}"], stdin=file, check=True)
    group = "/sys/fs/cgroup/large"
    machine.run(f"echo +memory >/sys/fs/cgroup/cgroup.subtree_control; mkdir {group}; echo {LARGE_MIB}M >{group}/memory.max")
    machine.run(f"if [ -e {group}/memory.swap.max ]; then echo 0 >{group}/memory.swap.max; fi")
    limit = f"echo $$ >{group}/cgroup.procs && exec /root/vedge-run"
    frames = machine.run(f"{limit} /root/model.onnx {source[1]!r} --top 1 --max-frames 2", timeout=600).stdout
    assert len([top_label(line) for line in frames.splitlines() if line.startswith("{")]) == 2, frames
    report = json.loads(machine.run(f"{limit} bench /root/model.onnx --runs 1 --warmup 0 --json", timeout=600).stdout)
    peak, size = report["peak_memory_mib"], args.large.stat().st_size / 1e6
    assert "oom_kill 0" in machine.run(f"cat {group}/memory.events").stdout
    return (
        f"{args.large.name} ({size:.1f} MB) runs on the camera in {LARGE_MIB} MiB of a machine with {args.memory}; "
        f"peak {peak:.1f} MiB"
    )


def cases(args, machine, label):
    done = 0

    def passed(what):
        nonlocal done
        done += 1
        print(f"ok     {what}", flush=True)

    work = args.work / "bundles"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    source = ["--source", f"v4l2:///dev/video0?format=RGB3&size={WIDTH}x{HEIGHT}", "--options", "--top 1"]

    def bundle(name, *more):
        line = [args.vedge, "bundle", args.model, "--board", "generic-aarch64", "--program", args.board, "-o", work / name]
        subprocess.run([*line, *(more if "--source" in more else [*source, *more])], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return work / name

    def deploy(what, *more, expect=0):
        line = [args.vedge, "deploy", what, "root@127.0.0.1", "--ssh", machine.ssh, *more]
        result = subprocess.run(line, capture_output=True, text=True)
        assert result.returncode == expect, f"{what}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    first = bundle("first")
    seconds = machine.start()
    passed(f"booted, ssh answers after {seconds:.0f} s")

    text = deploy(first)
    machine.answers("vedge", label)
    owner = machine.run("ps -o user= -p $(systemctl show -p MainPID --value vedge)").stdout.strip()
    assert owner != "root", f"the service runs as {owner}"
    passed(f"deployed; the service answers with {label}, not as root ({owner})")

    machine.run("systemctl reboot", check=False, timeout=20)
    machine.process.wait(timeout=120)
    machine.start()
    machine.answers("vedge", label)
    passed("rebooted; it answers again")

    shown = machine.shows("vedge")
    assert {name: shown[name] for name in UNIT} == UNIT, shown
    drop_in = "/run/systemd/system/vedge.service.d"
    machine.run(f"mkdir -p {drop_in}; printf '[Service]\\nWatchdogSec={WATCHDOG}\\n' >{drop_in}/test.conf; systemctl daemon-reload")
    machine.run("systemctl restart vedge")
    shown = machine.shows("vedge")
    assert shown["ActiveState"] == "active", shown
    restarts = int(shown["NRestarts"])
    begun = time.time()
    machine.run(f"kill -STOP {shown['MainPID']}")
    while int(machine.shows("vedge")["NRestarts"]) == restarts:
        assert time.time() - begun < 10 * WATCHDOG, f"still hung: {machine.shows('vedge')}"
        time.sleep(1)
    seconds = time.time() - begun
    assert "Watchdog timeout" in machine.run("journalctl -b -u vedge").stdout
    machine.run(f"rm -r {drop_in}; systemctl daemon-reload; systemctl restart vedge; journalctl --rotate; journalctl --vacuum-time=1s")
    machine.answers("vedge", label)
    passed(f"a service that hangs is started again (after {seconds:.0f} s), and answers")

    liar = work / "liar"
    liar.write_text('#!/bin/sh\ncase $1 in doctor) echo "BAD   self-test    cosine 0.1"; exit 1 ;; esac\nexit 0\n')
    failing = work / "failing"
    repack(first, failing, liar)
    text = deploy(failing, expect=1)
    assert "fails its self-test" in text, text
    machine.run("systemctl is-active vedge")
    release = json.loads((first / "manifest.json").read_text())["version"]
    assert machine.run("readlink /opt/vedge/vedge/current").stdout.strip() == f"releases/{release}"
    passed("an upgrade that fails its self-test is rolled back")

    machine.run("systemctl disable --now vedge")
    package = bundle("vedge-deb.deb", "--name", "vedge-deb", "--source", source[1].replace("video0", "camera"))
    with open(package, "rb") as file:
        subprocess.run([*machine.ssh.split(), "root@127.0.0.1", "cat >/root/vedge.deb"], stdin=file, check=True)
    machine.run("dpkg -i /root/vedge.deb")
    shown = machine.shows("vedge-deb")
    assert shown["ActiveState"] == "active" and shown["StatusText"].startswith("no frames: cannot open camera /dev/camera"), shown
    machine.run("ln -s video0 /dev/camera")
    machine.answers("vedge-deb", label)
    machine.run("dpkg --purge vedge-deb")
    left = machine.run("find / -xdev -name '*vedge-deb*' -not -path '/proc/*' -not -path '/var/log/*'").stdout.split()
    assert not left, f"left behind: {left}"
    assert machine.run("systemctl is-active vedge-deb", check=False).returncode != 0
    passed("a Debian package installs without its camera, answers when that comes, and purges without a trace")
    if args.large:
        passed(large(args, machine, work, source))
    machine.run("poweroff", check=False, timeout=20)
    return done


if __name__ == "__main__":
    main()
