"""What the documents tell people to type exists: commands, options, files.

Usage: commands.py --vedge VEDGE --run VEDGE_RUN

Every `vedge` and `vedge-run` command in a code block or between backticks must name a command that the program has, with
options that its --help lists; docs/building.md must hold the very commands that `vedge build --dry-run` prints; links must
lead to files; parts of tests/run must be parts.
"""

import argparse
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Board, target and route of the builds that docs/building.md shows.
BUILDS = [
    ("pi5", "aarch64-unknown-linux-musl", "system"),
    ("pi5", "aarch64-unknown-linux-gnu", "zig"),
    ("pi5", "aarch64-unknown-linux-gnu", "cross"),
    ("generic-armv7", "armv7-unknown-linux-gnueabihf", "system"),
    ("generic-armv7", "armv7-unknown-linux-gnueabihf", "zig"),
]


def documents():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split() if not name.startswith(("vendor/", "tests/records/")) and name != "CHANGELOG.md"]


def commands(text):
    """Lines of code blocks, continued lines joined, and words between backticks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for block in blocks:
        yield from re.sub(r"\\\n\s*", "", block).splitlines()
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))


def split(line):
    """Words of each simple command of a line; its comment is left out."""
    words, found = [], []
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        for word in lexer:
            if word and set(word) <= set("|&;"):
                found.append(words)
                words = []
            else:
                words.append(word)
    except ValueError:  # prose with an apostrophe
        return []
    return [*found, words]


@cache
def help_of(program, *words):
    result = subprocess.run([program, *words, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, f"{program} {words}: {result.stderr}"
    return result.stdout


@cache
def subcommands(program, *words):
    part = help_of(program, *words).partition("Commands:\n")[2].partition("\n\n")[0]
    return {line.split()[0] for line in part.splitlines() if re.match(r"  \S", line)} - {"help"}


def problem(programs, words):
    """What is wrong with one command, or nothing; None when it is none of ours."""
    at = [i for i, word in enumerate(words) if Path(word).name in programs]
    ours = [i for i in at if i == 0 or words[i - 1] == "--" or words[0] in ("ssh", "sudo")]
    if not ours or (len(words) == 1 and "/" not in words[0]):
        return None
    name, rest = Path(words[ours[0]]).name, words[ours[0] + 1 :]
    if "--" in rest and words[0] != "cargo":
        rest = rest[: rest.index("--")]
    if rest == ["--"]:
        return None
    program, path = programs[name], []
    while rest and subcommands(program, *path):
        choices = rest[0].split("|")
        if not set(choices) <= subcommands(program, *path):
            break
        path.append(choices[0])
        rest = rest[1:]
    if name == "vedge" and not path and rest and not rest[0].startswith("-"):
        return f"{name} has no command {rest[0]}"
    known = set(re.findall(r"--[a-z0-9-]+|(?<![\w-])-[a-zA-Z]\b", help_of(program, *path)))
    options = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    unknown = [option for option in options if option not in known]
    return f"{name} {' '.join(path)} has no option {', '.join(unknown)}" if unknown else ""


def check(path, programs, parts):
    """Number of commands found in a document, and what is wrong in it."""
    text, count, wrong = path.read_text(), 0, []
    for line in commands(text):
        if line.startswith("OPTIONS="):
            line = f"vedge-run MODEL SOURCE {line.removeprefix('OPTIONS=')}"
        for words in split(line.replace("…", " ")):
            found = problem(programs, words)
            count += found is not None
            wrong += [f"{line}: {found}"] if found else []
            if words and words[0] == "tests/run":
                wrong += [f"{line}: no part {word}" for word in words[1:] if word not in parts]
    for target in re.findall(r"\]\(([^)#]+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if "://" not in target and not (path.parent / target).exists():
            wrong.append(f"the link to {target} leads nowhere")
    return count, wrong


def building(vedge):
    """Commands that `vedge build` runs and docs/building.md does not show."""
    text = "\n".join(" ".join(line.split()) for line in commands((ROOT / "docs/building.md").read_text()))
    for board, target, route in BUILDS:
        line = [vedge, "build", "--board", board, "--target", target, "--route", route, "--dry-run"]
        result = subprocess.run(line, capture_output=True, text=True)
        shown = result.stdout.strip()
        if result.returncode != 0 or shown not in text:
            yield f"{target} by {route} is built by this command, which is not there: {shown}{result.stderr}"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("vedge", "run"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    programs = {"vedge": args.vedge, "vedge-run": args.run}
    parts = re.search(r"tests/run((?: \[\w+\])+)", (ROOT / "tests/run").read_text()).group(1)
    parts = re.findall(r"\w+", parts)
    total, failures = 0, 0
    for path in documents():
        count, wrong = check(path, programs, parts)
        wrong += building(args.vedge) if path.name == "building.md" else []
        total, failures = total + count, failures + len(wrong)
        for what in wrong:
            print(f"FAILED {path.relative_to(ROOT)}: {what}")
    # Were the documents read at all?
    assert total > 25, f"only {total} commands found"
    if failures:
        raise SystemExit(f"{failures} things that documents tell people do not exist")
    print(f"{total} commands in the documents exist, with their options")


if __name__ == "__main__":
    main()
