"""Figures of the code and the notebooks: `python tools/figures.py [--root FOLDER] [--json]`

Lines, functions, export cells, prose, reading time and imports, counted from the files alone; nothing is executed.
"""
import argparse
import ast
import json
import re
from pathlib import Path
from statistics import median

WORDS, LINES = 220, 25                  # read in a minute: words of prose, lines of code
SKIP = ("_modidx.py",)


def p95(xs):
    xs = sorted(xs)
    return xs[min(len(xs) - 1, round(.95 * (len(xs) - 1)))] if xs else 0


def text(s):
    return s if isinstance(s, str) else "".join(s)


def cells(nb):
    return json.loads(nb.read_text(encoding="utf-8"))["cells"]


def flags(src):
    return {m.split()[0] for m in re.findall(r"^#\|\s*(\S.*)$", src, flags=re.M)}


def exported(c):
    return c["cell_type"] == "code" and bool(flags(text(c["source"])) & {"export", "exports", "exporti"})


def code_lines(src):
    return sum(1 for s in src.splitlines() if s.strip() and not s.lstrip().startswith("#"))


def words(md):
    return len(re.sub(r"```.*?```|\$\$.*?\$\$|!\[[^\]]*\]\([^)]*\)", " ", md, flags=re.S).split())


def functions(lib):
    "`(lines, parameters)` of every function, nested ones too"
    for py in lib.rglob("*.py"):
        if py.name in SKIP: continue
        for n in ast.walk(ast.parse(py.read_text(encoding="utf-8"))):
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef):
                a = n.args
                names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                yield n.end_lineno - n.lineno + 1, len([p for p in names if p not in ("self", "cls")])


def module_files(lib):
    "Dotted name below the package -> file"
    return {".".join(p.relative_to(lib).with_suffix("").parts).removesuffix(".__init__"): p
            for p in lib.rglob("*.py") if p.name not in SKIP}


def imports_of(name, files):
    "Modules of the package that a module imports at its top level"
    package = name.split(".")[:-1]
    for n in ast.parse(files[name].read_text(encoding="utf-8")).body:
        if not isinstance(n, ast.ImportFrom) or not n.level: continue
        base = package[:len(package) + 1 - n.level] + (n.module.split(".") if n.module else [])
        for dotted in [".".join(base), *(".".join([*base, a.name]) for a in n.names)]:
            if dotted in files and dotted != name: yield dotted


def behind(name, files):
    "Lines of all modules that come along with one, its own included"
    seen, todo = set(), [name]
    while todo:
        if (m := todo.pop()) in seen: continue
        seen.add(m); todo += imports_of(m, files)
    return sum(len(files[m].read_text(encoding="utf-8").splitlines()) for m in seen)


def shown(nb_cells):
    "`(exported names, those that one of the next four visible code cells uses)`"
    n = hit = 0
    for i, c in enumerate(nb_cells):
        if not exported(c): continue
        names = [d.name for d in ast.parse(re.sub(r"^[%!].*$", "", text(c["source"]), flags=re.M)).body
                 if isinstance(d, ast.FunctionDef | ast.ClassDef) and not d.name.startswith("_")]
        after = [text(d["source"]) for d in nb_cells[i + 1:] if d["cell_type"] == "code" and not exported(d)
                 and "hide" not in flags(text(d["source"]))][:4]
        n += len(names); hit += sum(any(re.search(rf"\b{re.escape(x)}\b", s) for s in after) for x in names)
    return n, hit


def minutes(notebooks):
    "Minutes to read notebooks: prose, and every line of visible code"
    prose = sum(words(text(c["source"])) for nb in notebooks for c in cells(nb) if c["cell_type"] == "markdown")
    code = sum(code_lines(text(c["source"])) for nb in notebooks for c in cells(nb)
               if c["cell_type"] == "code" and "hide" not in flags(text(c["source"])))
    return prose / WORDS + code / LINES


def method(root):
    "Notebooks of the sidebar's section on the method, in its order"
    side = (root / "nbs/sidebar.yml").read_text(encoding="utf-8").split("- section: ")
    part = next((s for s in side if s.lower().startswith("the method")), "")
    return [root / "nbs" / n for n in re.findall(r"- (\S+\.ipynb)", part)]


def figures(root):
    "name: figure"
    lib, nbs = root / "t2v_turbo", root / "nbs"
    files = module_files(lib)
    lines = {m: len(p.read_text(encoding="utf-8").splitlines()) for m, p in files.items()}
    fn, par = zip(*functions(lib))
    books = [p for p in sorted(nbs.rglob("*.ipynb")) if not any(s[0] in "_." for s in p.relative_to(nbs).parts)]
    by = {p: cells(p) for p in books}
    exports = [code_lines(text(c["source"])) for cs in by.values() for c in cs if exported(c)]
    code = [c for cs in by.values() for c in cs if c["cell_type"] == "code" and any(map(exported, cs))]
    names = [shown(cs) for cs in by.values()]
    total, seen = sum(n for n, _ in names), sum(h for _, h in names)
    prose = sum(words(text(c["source"])) for cs in by.values() if any(map(exported, cs)) for c in cs if c["cell_type"] == "markdown")
    readme = re.sub(r"```.*?```", "", (root / "README.md").read_text(encoding="utf-8"), flags=re.S)
    tests = sorted((root / "tests").glob("test_*.py"))
    return {
        "modules": len([m for m in files if lines[m] > 1]), "lines": sum(lines.values()), "longest module": max(lines.values()),
        "function lines: median, p95, most": [median(fn), p95(fn), max(fn)], "parameters, most": max(par),
        "export cell lines: median, p95": [median(exports), p95(exports)],
        "exported share of code: lines, cells": [round(sum(exports) / sum(code_lines(text(c["source"])) for c in code), 3),
                                                 round(sum(map(exported, code)) / len(code), 3)],
        "exported names shown in the next four visible cells": [seen, total, round(seen / total, 3)],
        "words of prose per exported line": round(prose / sum(exports), 2),
        "README words": len(readme.split()), "test files": len(tests),
        "test functions": sum(len(re.findall(r"^def test_", t.read_text(encoding="utf-8"), flags=re.M)) for t in tests),
        "minutes to read the method": round(minutes(method(root))),
        **{f"lines behind {m}": behind(m, files) for m in ("solver", "consistency", "student", "distill", "train") if m in files}}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    got = figures(a.root)
    if a.json: print(json.dumps(got, indent=2))
    else:
        for k, v in got.items(): print(f"{k:52} {', '.join(map(str, v)) if isinstance(v, list) else v}")
