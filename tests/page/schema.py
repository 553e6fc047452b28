"""Every line that the program writes is one that docs/answer.schema.json describes, and a wrong one is not.

Usage: schema.py --run VEDGE_RUN --model MODEL.onnx     Needs jsonschema.

A model of the shipped pictures' classes whose card has limits. Additional fields are allowed by the schema, so that new ones may
come; here none may: each must be described.
"""

import argparse
import copy
import json
import subprocess
from pathlib import Path

from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "models" / "fashion" / "test"
RUNS = [
    [str(PICTURES), "--lines", "both", "--smooth", "0"],
    [str(PICTURES), "--lines", "events", "--smooth", "0", "--threshold", "0.3"],
    [str(PICTURES), "--lines", "both", "--top", "1", "--unknown", "auto", "--smooth", "0"],
    [str(PICTURES), "--top", "99", "--min-confidence", "1", "--max-energy", "-9"],
    ["synthetic://64x48?fps=100", "--max-frames", "20", "--lines", "both", "--rotate", "90", "--flip"],
]


def strict(schema):
    """The same schema, which allows no field that it does not describe."""
    if isinstance(schema, dict):
        schema = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and schema.get("type") == "object":
            schema["additionalProperties"] = False
    return schema


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    schema = json.loads((ROOT / "docs" / "answer.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    loose, exact = Draft202012Validator(schema), Draft202012Validator(strict(schema))
    fields, counts, frame = set(), {}, None
    for words in RUNS:
        done = subprocess.run([args.run, args.model, *words], check=True, capture_output=True, text=True, timeout=120)
        for line in done.stdout.splitlines():
            value = json.loads(line)
            problems = [e.message for validator in (loose, exact) for e in validator.iter_errors(value)]
            assert not problems, f"{words}: {line}\n{problems}"
            kind = value.get("event", "frame")
            counts[kind] = counts.get(kind, 0) + 1
            fields |= set(value)
            frame = value if kind == "frame" else frame
    described = {name for part in schema["$defs"].values() for name in part["properties"]}
    assert fields == described, f"never seen: {described - fields}, not described: {fields - described}"
    assert all(counts.get(kind, 0) > 0 for kind in ("frame", "entered", "left")), counts
    for path, wrong in ((("v",), 2), (("seq",), -1), (("top", 0, "p"), 1.5), (("state",), 3), (("ms", "infer"), "1"), (("unknown",), 0)):
        bad = copy.deepcopy(frame)
        place = bad
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = wrong
        assert not loose.is_valid(bad), f"{path} = {wrong!r} passes"
    print("lines that fit the schema:", counts)


if __name__ == "__main__":
    main()
