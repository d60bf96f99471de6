"""Give the notebooks consecutive numbers again: `python tools/renumber.py`, then `nbdev_export`

A new notebook is called `NNb_name.ipynb`, NN being the last notebook that it needs, and has its line in nbs/sidebar.yml. This renames it and all that follow, and every mention of
them: file names, links, and "notebook NN" in a text.
"""
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERED = re.compile(r"(\d\d[a-z]?)_(\w+)\.ipynb")


def numbers(names):
    "The number that each numbered notebook gets: {name without .ipynb: name with the new number}"
    own = sorted(m.groups() for n in names if (m := NUMBERED.fullmatch(n)))
    return {f"{n}_{name}": f"{i:02}_{name}" for i, (n, name) in enumerate(own)}


def renamed(text, new):
    "The text with every mention of a notebook under its new number"
    short = {old.split("_")[0]: now.split("_")[0] for old, now in new.items()}
    text = re.sub("|".join(rf"\b{re.escape(old)}\b" for old in sorted(new, key=len, reverse=True)), lambda m: new[m[0]], text)
    return re.sub(r"\b([Nn]otebook )(\d\d[a-z]?)\b", lambda m: m[1] + short.get(m[2], m[2]), text)


def main():
    new = {old: now for old, now in numbers(p.name for p in (ROOT / "nbs").iterdir()).items() if old != now}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for file in (ROOT / f for f in files if f.endswith((".ipynb", ".py", ".md", ".yml", ".txt", ".toml", ".js", ".html", ".cff")) and not f.startswith("t2v_turbo/")):
        if not file.is_file(): continue
        text = file.read_text(encoding="utf-8")
        if (now := renamed(text, new)) != text: file.write_text(now, encoding="utf-8")
    for old in sorted(new, reverse=True): subprocess.run(["git", "mv", f"nbs/{old}.ipynb", f"nbs/{new[old]}.ipynb"], cwd=ROOT, check=True)
    print("\n".join(f"{old} -> {now}" for old, now in new.items()) or "nothing to rename")


if __name__ == "__main__": main()
