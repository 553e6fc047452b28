#!/usr/bin/env python3
"""Latency of models beside peers: one process each, in turns (A B C A B C …), so that a drifting machine is fair.

    speed.py [--rounds 5] [--runs 30] [--threads 1] [--record FILE.md] NAME=SPEC…

SPEC is one of
    vedge:MODEL          vedge-run bench
    plain:MODEL          vedge-run bench --plain: what tract alone does
    ort:MODEL            onnxruntime, all graph optimizations
    openvino:MODEL       openvino, latency hint; it may compute floats in fewer bits, as it does where the CPU multiplies bfloat16
    openvino-f32:MODEL   the same, told to compute in 32-bit floats
The first entrant is the one the others are compared with. Each round starts each program once; it loads the model,
warms up and times `--runs` inferences of batch 1. Printed: median over the rounds of the medians, fastest run, load
time, memory, and the median's ratio to the first entrant's.
"""
import argparse, datetime, json, os, platform, re, resource, statistics, subprocess, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = ("vedge", "plain", "ort", "openvino", "openvino-f32")
RUN = os.environ.get("VEDGE_RUN", os.path.join(HERE, "../../target/release/vedge-run"))


def peer(kind, model, runs, threads):
    """Runs in a process of its own: times a peer and prints the same JSON as vedge-run bench."""
    import numpy as np
    start = time.perf_counter()
    if kind == "ort":
        import onnxruntime as ort
        imported = time.perf_counter()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        spec = session.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in spec.shape]
        run = lambda x: session.run(None, {spec.name: x})
    else:
        import openvino as ov
        imported = time.perf_counter()
        core = ov.Core()
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        hints |= {"INFERENCE_PRECISION_HINT": "f32"} if kind == "openvino-f32" else {}
        compiled = core.compile_model(core.read_model(model), "CPU", hints)
        shape = list(compiled.inputs[0].shape)
        request = compiled.create_infer_request()
        run = lambda x: request.infer([x])
    loaded = time.perf_counter()
    x = np.random.default_rng(7).uniform(-1, 1, shape).astype(np.float32)
    run(x)
    first = time.perf_counter()
    for _ in range(5):
        run(x)
    times = []
    for _ in range(runs):
        t = time.perf_counter()
        run(x)
        times.append((time.perf_counter() - t) * 1e3)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"median_ms": statistics.median(times), "min_ms": min(times), "load_ms": (loaded - imported) * 1e3,
                      "first_result_ms": (first - imported) * 1e3, "peak_memory_mib": memory}))


def once(kind, model, runs, threads):
    if kind in ("vedge", "plain"):
        command = [RUN, "bench", model, "--json", "--threads", str(threads), "--runs", str(runs), "--warmup", "6"]
        command += ["--plain"] if kind == "plain" else []
    else:
        command = [sys.executable, __file__, "--peer", kind, model, str(runs), str(threads)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(out[out.index("{"):])


def versions():
    from importlib import metadata
    found = []
    for package in ("onnxruntime", "openvino"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    return ", ".join(found)


def cpu():
    names = re.findall(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        return peer(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--title", default="")
    p.add_argument("--record", help="append the table to this file")
    p.add_argument("entrants", nargs="+", metavar="NAME=SPEC")
    a = p.parse_args()
    entrants = []
    for e in a.entrants:
        name, spec = e.split("=", 1)
        kind, model = spec.split(":", 1)
        if kind not in KINDS:
            p.error(f"{e}: no kind `{kind}`; there are {', '.join(KINDS)}")
        entrants.append((name, kind, model, []))
    for _ in range(a.rounds):
        for _, kind, model, results in entrants:
            results.append(once(kind, model, a.runs, a.threads))
    lines = [f"### {a.title or 'Latency'}", "",
             f"Measured {datetime.date.today()}, {cpu()}, {a.threads} thread(s), batch 1, {a.rounds} rounds in turns of "
             f"{a.runs} runs each. {versions()}", "",
             "| | median ms | fastest ms | load ms | to first result ms | memory MiB | median / first row |", "|---|---|---|---|---|---|---|"]
    base = None
    for name, _, _, results in entrants:
        pick = lambda key: statistics.median(r[key] for r in results)
        median = pick("median_ms")
        base = base or median
        lines.append(f"| {name} | {median:.2f} | {min(r['min_ms'] for r in results):.2f} | {pick('load_ms'):.0f} | "
                     f"{pick('first_result_ms'):.0f} | {pick('peak_memory_mib'):.0f} | {median / base:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if a.record:
        with open(a.record, "a") as f:
            f.write(text + "\n")


if __name__ == "__main__":
    main()
