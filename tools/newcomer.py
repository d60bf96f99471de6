"""A newcomer's first hour: `python tools/newcomer.py [--skip-tests] [--keep FOLDER]`

Takes the shell and Python blocks out of README.md and runs them in their order, unchanged, in a fresh environment and a fresh copy of
what git has, which stands for the block with `git clone`. Python blocks run as one session. `--skip-tests` passes over blocks with
`pytest`, which take longest. The first failure ends it. Needs Python 3.11 and a package index.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(md):
    "`(language, text)` of every fenced block that is a command or Python"
    return [(lang, body) for lang, body in re.findall(r"^```(sh|python)\n(.*?)^```", md, flags=re.M | re.S)]


def copy_of_repository(folder):
    "The files that git has or would have, as a clone brings them"
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split("\0")
    for n in filter(None, names):
        if not (ROOT / n).is_file(): continue
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / n, folder / n)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--skip-tests", action="store_true", help="pass over blocks with pytest")
    p.add_argument("--keep", type=Path, help="the folder to work in")
    a = p.parse_args()
    work = (a.keep or Path(tempfile.mkdtemp())).resolve()
    repo, venv = work / "t2v_turbo", work / "venv"
    repo.mkdir(parents=True)
    copy_of_repository(repo)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST")}
    env |= dict(VIRTUAL_ENV=str(venv), PATH=f"{venv / 'bin'}:{os.environ['PATH']}", MPLBACKEND="Agg", PIP_DISABLE_PIP_VERSION_CHECK="1")
    session, began = "", time.perf_counter()
    for lang, body in blocks((repo / "README.md").read_text(encoding="utf-8")):
        head = body.strip().splitlines()[0][:80]
        if body.startswith("git clone ") or a.skip_tests and "pytest" in body:
            print(f"   -    {head}  (skipped)", flush=True)
            continue
        if lang == "sh": words = ["bash", "-euo", "pipefail", "-c", body]
        else:
            session += body
            words = ["python", "-c", session]
        start = time.perf_counter()
        done = subprocess.run(words, cwd=repo, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        print(f"{time.perf_counter() - start:6.0f} s  {head}", flush=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
            return 1
    print(f"{(time.perf_counter() - began)/60:.1f} minutes in all")
    if not a.keep: shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
