"tests/durations.txt from the log of `pytest --full`: `python tools/durations.py LOG`"
import re
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "tests/durations.txt"
LINE = re.compile(r"^([\d.]+)s (?:setup|call|teardown) +(tests/\S.*)$", re.M)


def main(log):
    taken = {}
    for seconds, name in LINE.findall(Path(log).read_text(encoding="utf-8")): taken[name.strip()] = taken.get(name.strip(), 0) + float(seconds)
    if not taken: sys.exit(f"{log} has no list of durations: give the output of `pytest --full`")
    rows = sorted(((s, n) for n, s in taken.items()), key=lambda r: (-r[0], r[1]))
    OUT.write_text("".join(f"{s:.1f} {n}\n" for s, n in rows), encoding="utf-8")
    print(f"{len(rows)} tests, {sum(taken.values()):.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
