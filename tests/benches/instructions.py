#!/usr/bin/env python3
"""Instructions per inference on aarch64, vedge-run beside ONNX Runtime, counted under qemu-user.

    instructions.py [--cpus cortex-a72,cortex-a76,max] [--symbols] [--record FILE.md] --board VEDGE_RUN NAME=SPEC…

SPEC is `vedge:MODEL` or `ort:MODEL`; the first entrant is the one the others are compared with. VEDGE_RUN is the board
binary (`cargo build --release --target aarch64-unknown-linux-musl --bin vedge-run`). Each program runs once with one
inference and once with three, one thread; half the difference is one inference, so loading and the first run cancel out.
Counts are exact and repeat to a few thousandths: what varies is where memory lies and how often a lock is tried. They are
simulated: they say what is executed, not how fast.

Needs the Debian packages qemu-user (the one that loads plugins), gcc, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and
libstdc++6-arm64-cross, and the Python package onnx. ONNX Runtime's aarch64 wheel is fetched by pip into target/instructions.
"""
import argparse, bisect, collections, datetime, json, os, shutil, subprocess, sys, zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(HERE, "../../target/instructions")
ORT = "1.24.4"
SYSROOT = "/usr/aarch64-linux-gnu"
RUNS = (1, 3)

# A64 instruction words by class: mask and value, the first that fits. Arm ARM, "Advanced SIMD" encodings.
CLASSES = [
    ("int8 dot product", 0x9F20FC00, 0x0E009400), ("int8 dot product", 0x9F00F400, 0x0F00E000),
    ("int8 matrix product", 0xFFE0F400, 0x4E80A400), ("int8 matrix product", 0xFFE0F400, 0x6E80A400),
    ("widening multiply", 0x9F20DC00, 0x0E20C000), ("widening multiply", 0x9F205C00, 0x0E204000 | 0x4000),
    ("widening multiply", 0x9F20FC00, 0x0E208000), ("widening multiply", 0x9F20FC00, 0x0E20A000),
    ("widening multiply", 0x9F003400, 0x0F002000), ("pairwise widening add", 0x9F3FEC00, 0x0E202800),
    ("pairwise widening add", 0x9F3FFC00, 0x0E206800),
    ("float multiply-add", 0xBFA0FC00, 0x0E20CC00), ("float multiply-add", 0xBFA0FC00, 0x0EA0CC00),
    ("float multiply-add", 0xBF80B400, 0x0F801000),
    ("vector load and store", 0x0E000000, 0x0C000000), ("vector other", 0x0E000000, 0x0E000000),
    ("load and store", 0x0A000000, 0x08000000), ("branch", 0x1C000000, 0x14000000), ("integer", 0, 0),
]
ORDER = list(dict.fromkeys(c[0] for c in CLASSES))


def class_of(word, known={}):
    if word not in known:
        known[word] = next(name for name, mask, value in CLASSES if word & mask == value)
    return known[word]


def build():
    """The plugin, ONNX Runtime's library and the program that calls it."""
    os.makedirs(WORK, exist_ok=True)
    at = lambda name: os.path.join(WORK, name)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", f"{HERE}/count.c", "-o", at("count.so")], check=True)
    if not os.path.exists(at("libonnxruntime.so.1")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", WORK,
                        "--platform=manylinux_2_28_aarch64", "--python-version=3.12", f"onnxruntime=={ORT}"], check=True)
        wheel = next(f for f in os.listdir(WORK) if f.startswith(f"onnxruntime-{ORT}-") and f.endswith(".whl"))
        with zipfile.ZipFile(at(wheel)) as z, open(at("part"), "wb") as out:
            shutil.copyfileobj(z.open(f"onnxruntime/capi/libonnxruntime.so.{ORT}"), out)
        os.rename(at("part"), at("libonnxruntime.so.1"))
    subprocess.run(["aarch64-linux-gnu-gcc", "-O1", f"{HERE}/ort_runs.c", "-o", at("ort_runs"), at("libonnxruntime.so.1"),
                    "-Wl,--allow-shlib-undefined"], check=True)


def execute(cpu, program):
    """Runs a program; returns executions by (address, words) of a block, addresses as in the file for a static program."""
    out = os.path.join(WORK, f"blocks.{os.getpid()}")
    command = ["qemu-aarch64", "-cpu", cpu, "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={WORK}", "-plugin",
               f"{WORK}/count.so,out={out}", *program]
    r = subprocess.run(command, capture_output=True, text=True)
    if r.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{r.stderr}")
    blocks = collections.Counter()
    with open(out) as f:
        for line in f:
            address, executions, *words = line.split()
            blocks[int(address, 16), tuple(words)] += int(executions, 16)
    os.remove(out)
    return blocks, r.stdout


def command(kind, board, model, runs):
    if kind == "vedge":
        return [board, "bench", "--threads", "1", "--warmup", "1", "--runs", str(runs), "--json", model]
    if kind != "ort":
        sys.exit(f"no program '{kind}'; there are vedge and ort")
    import onnx
    graph = onnx.load(model, load_external_data=False).graph
    shape = [str(d.dim_value or 1) for d in graph.input[0].type.tensor_type.shape.dim]
    return [f"{WORK}/ort_runs", model, str(runs), graph.input[0].name, graph.output[0].name, *shape]


def symbols(board):
    """Functions of the program by address."""
    lines = subprocess.run(["aarch64-linux-gnu-nm", "-C", "--defined-only", board], capture_output=True, text=True).stdout
    rows = [line.split(" ", 2) for line in lines.splitlines()]
    return sorted((int(a, 16), name) for a, kind, name in rows if kind in "tTwW")


def count(cpu, kind, board, model):
    """Instructions of one inference by class and by block address, and the kernels that vedge-run reports."""
    (one, _), (more, stdout) = [execute(cpu, command(kind, board, model, n)) for n in RUNS]
    more.subtract(one)
    classes, addresses = collections.Counter(), collections.Counter()
    for (address, words), n in more.items():
        addresses[address] += n * len(words) / (RUNS[1] - RUNS[0])
        for w in words:
            classes[class_of(int(w, 16))] += n / (RUNS[1] - RUNS[0])
    return classes, addresses, json.loads(stdout)["kernels"] if kind == "vedge" else f"onnxruntime {ORT}"


def by_symbol(board, addresses):
    table, totals = symbols(board), collections.Counter()
    # Where qemu puts a position-independent program.
    base = 0x5500000000 if max(addresses) > 0x5500000000 else 0x4000000000 if max(addresses) > 0x4000000000 else 0
    for address, n in addresses.items():
        totals[table[bisect.bisect(table, (address - base, "~")) - 1][1]] += n
    return totals


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cpus", default="cortex-a72,cortex-a76,max")
    p.add_argument("--board", required=True)
    p.add_argument("--symbols", action="store_true", help="also print the functions that execute most")
    p.add_argument("--record")
    p.add_argument("entrants", nargs="+", metavar="NAME=SPEC")
    a = p.parse_args()
    build()
    text = ""
    for cpu in a.cpus.split(","):
        rows, first = [], None
        for entrant in a.entrants:
            name, spec = entrant.split("=", 1)
            kind, model = spec.split(":", 1)
            classes, addresses, kernels = count(cpu, kind, a.board, model)
            total = sum(classes.values())
            first = first or total
            rows.append([f"{name} ({kernels})", total / 1e6, total / first, classes])
            print(f"{cpu} {name}: {total / 1e6:.1f} million", file=sys.stderr)
            if a.symbols and kind == "vedge":
                for symbol, n in by_symbol(a.board, addresses).most_common(14):
                    print(f"  {n / 1e6:9.2f}  {symbol}", file=sys.stderr)
        shown = [c for c in ORDER if any(r[3][c] / 1e6 >= 0.05 for r in rows)]
        text += f"\n{cpu}, millions of instructions:\n\n| | all | / first row | " + " | ".join(shown) + " |\n"
        text += "|---" * (3 + len(shown)) + "|\n"
        for name, total, ratio, classes in rows:
            text += f"| {name} | {total:.1f} | {ratio:.2f} | " + " | ".join(f"{classes[c] / 1e6:.1f}" for c in shown) + " |\n"
    qemu = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True).stdout.split()[2]
    text = f"\nSimulated {datetime.date.today()}, qemu-user {qemu}, 1 thread, batch 1, onnxruntime {ORT}.\n{text}"
    print(text)
    if a.record:
        with open(a.record, "a") as f:
            f.write(text)


main()
