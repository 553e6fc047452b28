"""Prints the path of the test executable that `cargo test --no-run --message-format=json` on stdin built; exactly one."""

import json
import sys

found = []
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
        found.append(message["executable"])
if len(found) != 1:
    raise SystemExit(f"expected one test executable, cargo built {len(found)}: {found}")
print(found[0])
