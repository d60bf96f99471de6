"""The check in three fresh environments: `python tools/environments.py [floors] [colab] [newest] [--python PATH] [--keep FOLDER]`

floors   every requirement of settings.ini at its floor; the suite's core without its slow tests
colab    what Colab has (tests/colab-*.txt), where the notebooks' own cell installs the package; two notebooks, the same tests
newest   the newest of everything, with the development extra; the whole suite

Any Python from 3.11 on may start it. Each environment has a Python of its own, which is looked for on PATH, among pyenv's versions and in
/usr/local/bin; `--python` names another. An environment without its Python is reported and left out, unless it was asked for by name.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLAB = sorted((ROOT / "tests").glob("colab-*.txt"))[-1]
PYTHONS = dict(floors="3.12", colab="3.13", newest="3.11")
PARTNERS = ("torchvision", "torchao")               # installed too: transformers, diffusers and peft look for them
TESTS = ("pytest", "pytest-xdist", "click")       # click: `hf` of huggingface_hub 1.3 imports it and does not require it
TORCH = "torch==2.13.0"                             # some indexes have a CPU build of it, which is 20 times smaller


def ini():
    "settings.ini"
    file = ConfigParser(delimiters=["="])
    file.read(ROOT / "settings.ini", encoding="utf-8")
    return file["DEFAULT"]


def requirements():
    "`{name: floor}` of settings.ini"
    return dict(r.split(">=") for r in ini()["requirements"].split())


def constraints(path=COLAB):
    "`{name: version}` of a list of pins"
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), flags=re.M))


def find_python(version):
    "A Python of this version that can make environments, or None"
    home = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    code = f"import sys, venv, ensurepip, sqlite3, ctypes; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for p in (f"python{version}", *reversed(home), f"/usr/local/bin/python{version}", f"/usr/bin/python{version}", sys.executable):
        if shutil.which(p) and subprocess.run([p, "-c", code], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0: return str(p)


def sh(*words, **kw):
    return subprocess.run([str(w) for w in words], check=True, stdin=subprocess.DEVNULL, cwd=ROOT, **kw)


def pip(python, *words):
    "`pip install WORDS`; of its progress only large files and errors are shown"
    words = [python, "-m", "pip", "install", "--progress-bar", "off", *map(str, words)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT) as p:
        for line in p.stdout:
            if re.search(r"Downloading \S+ \([\d.]+ [MG]B\)|^ERROR", line): print("   ", line.strip(), flush=True)
    if p.returncode: raise subprocess.CalledProcessError(p.returncode, words)


def venv(base, folder):
    "Path of a fresh environment's Python"
    sh(base, "-m", "venv", folder)
    python = folder / "bin/python"
    pip(python, "-q", "--upgrade", "pip")
    return python


def make(name, base, folder):
    "An environment; its Python, and what pytest is given"
    core = ["-m", "core"]
    if name == "colab":                                     # its first notebook installs the package
        sh(sys.executable, ROOT / "tools/colab.py", "--python", base, "--keep", folder, "quickstart", "touch")
        pip(python := folder / "venv/bin/python", "-q", *TESTS)
        return python, core
    python = venv(base, folder / "venv")
    if name == "floors":
        pip(python, *(f"{n}=={v}" for n, v in requirements().items()), *TESTS)
        pip(python, ".")
        return python, core
    try: pip(python, TORCH)
    except subprocess.CalledProcessError: print(f"{TORCH} is not on this index: its newest is taken", flush=True)
    pip(python, "-e", ".[dev]")
    return python, ["--full"]


def check(name, base, folder):
    "Make the environment and run its tests; a row of the report"
    print(f"\n=== {name}: {base}", flush=True)
    began, made, wrong = time.perf_counter(), None, ""
    try:
        python, args = make(name, base, folder)
        sh(python, "-m", "pip", "check")
        made = time.perf_counter()
        own = dict(PATH=f"{python.parent}:{os.environ['PATH']}", VIRTUAL_ENV=str(python.parents[1]), OMP_NUM_THREADS="1")
        sh(python, "-m", "pytest", *args, env=os.environ | own)
    except subprocess.CalledProcessError as e: wrong = f"FAILED: {' '.join(map(str, e.cmd))[:200]}"
    ended = time.perf_counter()
    return bool(wrong), f"{name:8} installed in {(made or ended) - began:4.0f} s, tested in {ended - made if made else 0:5.0f} s  {wrong or 'passed'}"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PYTHONS)} (default: all)")
    p.add_argument("--python", help="for all environments, instead of the one that is looked for")
    p.add_argument("--keep", type=Path, help="a folder for the environments, which stay")
    a = p.parse_args()
    if stray := set(a.names) - set(PYTHONS): p.error(f"no environment {', '.join(stray)}: there are {', '.join(PYTHONS)}")
    failed, rows = False, []
    for name, version in PYTHONS.items():
        if a.names and name not in a.names: continue
        base = a.python or find_python(version)
        if not base:
            rows.append(f"{name:8} NOT RUN: no Python {version} on PATH, in ~/.pyenv/versions or in /usr/local/bin")
            print(f"\n=== {rows[-1]}", flush=True)
            failed |= name in a.names or name == "newest"
            continue
        folder = (a.keep or Path(tempfile.mkdtemp())).resolve() / name
        try: wrong, row = check(name, base, folder)
        finally:
            if not a.keep: shutil.rmtree(folder.parent)
        failed |= wrong
        rows.append(row)
    print("\n" + "\n".join(rows))
    return failed


if __name__ == "__main__":
    sys.exit(main())
