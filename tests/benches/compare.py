#!/usr/bin/env python3
"""Whether a change made a model slower: two builds of vedge-run in turns, and how much one of them differs from itself.

    compare.py BEFORE AFTER MODEL… [--rounds 9] [--runs 20] [--threads 1]

BEFORE and AFTER are programs. Each round runs BEFORE, AFTER, BEFORE; a run's figure is the median of its inferences.
The change is the median over the rounds of AFTER to the mean of the two runs around it; the noise is what nine in ten
rounds keep below when BEFORE is compared with itself, at least 0.5 %. Exit status 1 where AFTER is slower by more than
the noise.
"""
import argparse, json, statistics, subprocess, sys


def median_ms(program, model, runs, threads):
    command = [program, "bench", model, "--json", "--threads", str(threads), "--runs", str(runs), "--warmup", "4"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(out)["median_ms"]


def verdict(changes, selfs):
    """The change, the noise, and what to say: ratios of AFTER to BEFORE, and of BEFORE to itself."""
    change = statistics.median(changes) - 1
    spread = sorted(abs(s - 1) for s in selfs)
    noise = max(0.005, spread[min(len(spread) - 1, int(0.9 * len(spread)))])
    word = "SLOWER" if change > noise else "faster" if change < -noise else "no change beyond the noise"
    return change, noise, word


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("before")
    p.add_argument("after")
    p.add_argument("models", nargs="+", metavar="MODEL")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--runs", type=int, default=20)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    if a.rounds < 3:
        p.error(f"--rounds {a.rounds}: at least 3, the noise is measured from them")
    slower = 0
    for model in a.models:
        changes, selfs = [], []
        for _ in range(a.rounds):
            first, after, again = (median_ms(x, model, a.runs, a.threads) for x in (a.before, a.after, a.before))
            changes.append(2 * after / (first + again))
            selfs.append(again / first)
        change, noise, word = verdict(changes, selfs)
        slower += word == "SLOWER"
        print(f"{model}: {change:+.1%} (noise {noise:.1%}, {a.rounds} rounds): {word}", flush=True)
    sys.exit(slower > 0)


if __name__ == "__main__":
    main()
