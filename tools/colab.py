"""Every notebook as Colab would run it: `python tools/colab.py [NAMES] [--python PATH] [--keep FOLDER]`

A fresh environment with what Colab has: its Python, its versions (tests/colab-*.txt), its torchao and its Jupyter, and nothing of this
repository. Each notebook is executed from an empty folder; its own first cell installs the package. Two things of the world are stood in
for: pip finds the wheel that was just built (`PIP_FIND_LINKS`) instead of one on PyPI, and `T2V_TURBO_FILES` points at this checkout instead
of GitHub. Cells marked `slow`, `cuda` or `net` are passed over. At the end every package that Colab had must be there in the same version;
only torchao may be gone.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environments

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
MARK = "colab.research.google.com/github/"
RUN = """
import json, sys, nbformat, re
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], 4)
for c in nb.cells:
    if c.cell_type == "code" and re.search(r"^#\\|\\s*(slow|cuda|net)\\s*$", c.source, flags=re.M): c.source = ""
NotebookClient(nb, timeout=900, kernel_name="python3").execute()
"""


def marked():
    "Notebooks with a Colab badge that points at themselves"
    for p in sorted(NBS.rglob("*.ipynb")):
        links = re.findall(rf"{re.escape(MARK)}[\w./-]+/nbs/([\w./-]+\.ipynb)", p.read_text(encoding="utf-8"))
        if p.relative_to(NBS).as_posix() in links: yield p


def sh(*words, **kw):
    return subprocess.run([str(w) for w in words], check=True, stdin=subprocess.DEVNULL, **kw)


def environment(folder, base):
    "What Colab has, and a `google.colab` that is imported at start, as there"
    venv = folder / "venv"
    python = venv / "bin/python"
    if python.exists(): return python
    environments.venv(base, venv)
    pins = environments.constraints()
    names = [*(n for n in environments.requirements() if n in pins), *environments.PARTNERS, "ipykernel", "nbclient", "nbformat"]
    environments.pip(python, "-c", environments.COLAB, *names)
    site = Path(sh(python, "-c", "import site; print(site.getsitepackages()[0])", capture_output=True, text=True).stdout.strip())
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").touch()
    (site / "sitecustomize.py").write_text("import google.colab\n")
    return python


def wheel(folder):
    "The wheel of this checkout, in a folder that pip looks into"
    dist = folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "nbs", "tests", "runs", "_proc", "_docs", "build", "dist", "*.egg-info",
                                                                  "__pycache__"))
        sh(folder / "venv/bin/python", "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", dist, copy)
    return dist


def installed(python):
    "`{name: version}` of an environment"
    listed = sh(python, "-m", "pip", "list", "--format", "json", capture_output=True, text=True).stdout
    return {p["name"].lower(): p["version"] for p in json.loads(listed)}


def changed(before, after):
    "Lines about what Colab had and has no more in that version; a torchao that peft refuses may go"
    return [f"{n} {v} became {after.get(n)}" for n, v in before.items() if after.get(n) != v and (n, after.get(n)) != ("torchao", None)]


def run(python, nb, dist):
    "Seconds, and the end of the traceback if there was one"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST", "VIRTUAL_ENV")}
    env |= dict(PIP_FIND_LINKS=str(dist), T2V_TURBO_FILES=NBS.as_uri(), MPLBACKEND="module://matplotlib_inline.backend_inline",
                PATH=f"{python.parent}:{os.environ['PATH']}", PIP_DISABLE_PIP_VERSION_CHECK="1")
    with tempfile.TemporaryDirectory() as empty:
        shutil.copy(nb, empty)
        began = time.perf_counter()
        done = subprocess.run([python, "-c", RUN, nb.name], cwd=empty, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return round(time.perf_counter() - began), done.stderr[-3000:] if done.returncode else ""


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", help="notebooks, by a part of their path (default: all that are marked)")
    p.add_argument("--keep", type=Path, help="a folder for the environment, used again next time")
    p.add_argument("--python", help="of the environment (default: a Python 3.13 that is looked for)")
    a = p.parse_args()
    base = a.python or environments.find_python(environments.PYTHONS["colab"])
    if not base: return f"no Python {environments.PYTHONS['colab']} here: name one with --python"
    folder = (a.keep or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python, dist = environment(folder, base), wheel(folder)
    sh(python, "-m", "pip", "uninstall", "-q", "-y", "t2v_turbo", capture_output=True)
    before, failed = installed(python), {}
    for nb in marked():
        name = nb.relative_to(NBS).as_posix()
        if a.names and not any(n in name for n in a.names): continue
        took, wrong = run(python, nb, dist)
        print(f"{'FAIL' if wrong else 'ok':5} {took:4d} s  {name}", flush=True)
        if wrong: failed[name] = wrong
    if wrong := changed(before, installed(python)): failed["what Colab had"] = "; ".join(wrong)
    for name, wrong in failed.items(): print(f"\n--- {name}\n{wrong}")
    (folder / "failed.json").write_text(json.dumps(failed))
    if not a.keep: shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
