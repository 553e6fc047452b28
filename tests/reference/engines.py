"""Runs models: ours as `vedge-run infer`, the reference in ONNX Runtime."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort


class Refused(Exception):
    """One of our programs ended with an error; the text is its message."""


def command(*args):
    """Runs one of our programs; `Refused` with the last lines of stderr when it fails."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if done.returncode != 0:
        raise Refused(f"status {done.returncode}: " + " ".join(done.stderr.split())[-300:])
    return done.stdout


class Infer:
    """`vedge-run infer` on a batch `[n, 3, height, width]`, started at once; `result` waits for the logits `[n, …]`."""

    def __init__(self, program, model, batch, threads=1):
        self.folder = tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name) / "output.npy"
        batch_file = Path(self.folder.name) / "input.npy"
        np.save(batch_file, np.ascontiguousarray(batch, np.float32))
        program = program if isinstance(program, list) else [program]
        args = [*program, "infer", model, "--input", batch_file, "--output", self.output, "--threads", threads]
        self.process = subprocess.Popen([str(a) for a in args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def result(self):
        with self.folder:
            _, errors = self.process.communicate()
            if self.process.returncode != 0:
                raise Refused(f"status {self.process.returncode}: " + " ".join(errors.split())[-300:])
            return np.load(self.output)


def session(model, optimized, threads=1):
    """ONNX Runtime on the CPU. Not optimized, it computes Q/DQ pairs in float, exactly as the file says: its optimized
    integer kernels saturate on CPUs without VNNI and are no reference."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_rows(session, batch, output=0):
    """One output of the model for each row of a batch, one row at a time."""
    name, wanted = session.get_inputs()[0].name, [session.get_outputs()[output].name]
    return np.concatenate([session.run(wanted, {name: batch[i : i + 1]})[0] for i in range(len(batch))])
