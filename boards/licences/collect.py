#!/usr/bin/env python3
"""The licences of everything linked into vedge-run with all its features, written to NOTICES.txt beside this file.

Usage: boards/licences/collect.py            after a dependency changed
       boards/licences/collect.py --check    fails when NOTICES.txt does not name exactly the crates linked now
"""

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE / "NOTICES.txt"

STANDARD = """Rust's standard library: MIT OR Apache-2.0, copyright of the Rust project's contributors,
https://github.com/rust-lang/rust/blob/master/COPYRIGHT (the texts are those above).
musl: MIT, Copyright (c) 2005-2020 Rich Felker, et al., https://git.musl-libc.org/cgit/musl/tree/COPYRIGHT"""


def crates():
    """Packages that vedge-runtime links on a board, itself included, sorted."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--all-features", "--filter-platform=aarch64-unknown-linux-musl"]
    data = json.loads(subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout)
    packages = {p["id"]: p for p in data["packages"]}
    nodes = {n["id"]: n for n in data["resolve"]["nodes"]}
    todo = [i for i, p in packages.items() if p["name"] == "vedge-runtime"]
    seen = set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for dependency in nodes[current]["deps"]:
            macro = any("proc-macro" in t["kind"] for t in packages[dependency["pkg"]]["targets"])
            if not macro and any(k["kind"] is None for k in dependency["dep_kinds"]):
                todo.append(dependency["pkg"])
    return sorted((packages[i] for i in seen), key=lambda p: (p["name"], p["version"]))


def texts(package):
    """The licence files of a package, or of the folder above it for members of a workspace."""
    folder = Path(package["manifest_path"]).parent
    own = [folder] if package["source"] else [HERE.parents[1]]
    files = sorted(f for d in own for f in d.iterdir() if re.match(r"(?i)(licen[cs]e|copying|notice)", f.name) and f.is_file())
    return [f.read_text(errors="replace").strip() for f in files]


def main():
    found = crates()
    names = [f"{p['name']} {p['version']}" for p in found]
    if "--check" in sys.argv[1:]:
        listed = re.findall(r"^  (\S+ \S+)  ", OUT.read_text(), re.M)
        if listed != names:
            missing, gone = sorted(set(names) - set(listed)), sorted(set(listed) - set(names))
            raise SystemExit(f"{OUT}: not named: {missing}, no longer linked: {gone}; run boards/licences/collect.py")
        return
    lines = ["vedge-run is made of these packages, some of them only where it is built with TLS. After the list come their licences, each text once.", ""]
    lines += [f"  {name}  {p['license'] or 'see its licence file'}" for name, p in zip(names, found)]
    by_text = {}
    for name, package in zip(names, found):
        for text in texts(package):
            by_text.setdefault(re.sub(r"\s+", " ", text), (text, []))[1].append(name)
    for text, users in by_text.values():
        lines += ["", "=" * 100, ", ".join(users), "=" * 100, text]
    lines += ["", "=" * 100, "Rust's standard library; in static builds also musl", "=" * 100, STANDARD]
    OUT.write_text("\n".join(lines) + "\n")
    print(f"{OUT}: {len(names)} packages, {len(by_text)} texts, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
