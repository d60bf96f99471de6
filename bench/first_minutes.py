"""What the first minutes cost: import, commands, wheel, installation

    python bench/first_minutes.py [--install] [--out nbs/tutorials/first_minutes.json]

Each time is the fastest of `--repeats` fresh processes, after one that warms the disk. `--install` also installs the
wheel and all it requires into a fresh environment, once; how long that takes depends on the index and on pip's cache.
"""
import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from t2v_turbo.files import write_json

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {"import t2v_turbo": 1., "import t2v_turbo.core": None, "from t2v_turbo.pipeline import T2VTurboPipeline": None}
COMMANDS = {"t2v-turbo --version": 1., "t2v-turbo --help": 1., "t2v-turbo vbench --help": None, "t2v-turbo distill --help": None}


def timed(words, repeats, **kw):
    "Seconds of a command in a fresh process, the fastest of `repeats`"
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **kw)
        took.append(time.perf_counter() - began)
    return round(min(took[1:]), 2)


def loaded(code, name):
    "Is the module `name` loaded after `code`?"
    run = [sys.executable, "-c", f"import sys; {code}; print({name!r} in sys.modules)"]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == "True"


def build(folder):
    "Wheel and sdist of a copy without what git ignores"
    copy = Path(folder) / "copy"
    keep = ("t2v_turbo", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
            "CONTRIBUTING.md")
    copy.mkdir()
    for n in keep:
        if (ROOT / n).is_dir(): shutil.copytree(ROOT / n, copy / n, ignore=shutil.ignore_patterns("__pycache__"))
        else: shutil.copy(ROOT / n, copy / n)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, copy], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return next(Path(folder).glob("*.whl")), next(Path(folder).glob("*.tar.gz"))


def install(wheel, folder):
    "Seconds to install the wheel into a fresh environment, and its size"
    venv = Path(folder) / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    began = time.perf_counter()
    subprocess.run([venv / "bin/pip", "install", "-q", wheel], check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    took = time.perf_counter() - began
    size = sum(p.stat().st_size for p in venv.rglob("*") if p.is_file() and not p.is_symlink())
    return round(took), size


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--install", action="store_true", help="also install into a fresh environment")
    p.add_argument("--out", type=Path, help="write the rows as JSON")
    a = p.parse_args()
    rows = []
    row = lambda what, value, unit, limit=None: rows.append(dict(what=what, value=value, unit=unit, limit=limit))
    for code, limit in IMPORTS.items(): row(code, timed([sys.executable, "-c", code], a.repeats), "s", limit)
    row("import t2v_turbo loads diffusers", loaded("import t2v_turbo", "diffusers"), "", False)
    exe = Path(sys.executable).parent / "t2v-turbo"
    for command, limit in COMMANDS.items(): row(command, timed([exe, *command.split()[1:]], a.repeats), "s", limit)
    with tempfile.TemporaryDirectory() as tmp:
        wheel, sdist = build(tmp)
        row("wheel", round(wheel.stat().st_size/1e6, 1), "MB")
        row("sdist", round(sdist.stat().st_size/1e6, 1), "MB")
        if a.install:
            took, size = install(wheel, tmp)
            row("pip install, with all it requires", took, "s")
            row("that environment on disk", round(size/1e9, 1), "GB")
    about = dict(python=platform.python_version(), cores=os.cpu_count(), machine=platform.machine())
    if a.out: write_json(a.out, dict(about=about, rows=rows))
    for r in rows: print(f"{r['what']:55} {r['value']!s:>8} {r['unit']}")


if __name__ == "__main__":
    main()
