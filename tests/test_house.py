"The house rules of CONTRIBUTING.md, checked on whatever notebooks and modules there are."
import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import execute  # noqa: E402

sys.path.pop(0)
NBS, LIB = ROOT / "nbs", ROOT / "t2v_turbo"
BANNED = {"torchvision", "timm", "open_clip", "decord", "pickle"}


def visible(p, base):
    return not any(s[0] in "_." for s in p.relative_to(base).parts)


def src(cell):
    s = cell["source"]
    return s if isinstance(s, str) else "".join(s)


def flags(cell):
    return {m.split()[0] for m in re.findall(r"^#\|\s*(\S.*)$", src(cell), flags=re.M)}


def is_export(cell):
    return cell["cell_type"] == "code" and bool(flags(cell) & {"export", "exports", "exporti"})


def cells(nb):
    return json.loads(nb.read_text(encoding="utf-8"))["cells"]


def module_of(nb):
    "`default_exp` of a notebook, or None"
    found = (re.search(r"^#\|\s*default_exp\s+(\S+)", src(c), flags=re.M)
             for c in cells(nb) if c["cell_type"] == "code")
    return next((m[1] for m in found if m), None)


def rel(p):
    return p.relative_to(ROOT).as_posix()


notebooks = sorted(p for p in NBS.rglob("*.ipynb") if visible(p, NBS))
numbered = [p for p in notebooks if p.parent == NBS and re.match(r"\d\d", p.name)]
others = [p for p in notebooks if p not in numbered]
modules = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
each_nb = pytest.mark.parametrize("nb", notebooks, ids=rel)
each_numbered = pytest.mark.parametrize("nb", numbered, ids=rel)
each_other = pytest.mark.parametrize("nb", others, ids=rel)
each_module = pytest.mark.parametrize("py", modules, ids=rel)


def python(code, cwd, tmp=None):
    "Run `code` in a fresh interpreter. nbdev does nothing under IN_TEST, so that goes."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    if tmp:
        env["JUPYTER_DATA_DIR"] = str(tmp / "jupyter")
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, text=True,
                         stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert run.returncode == 0, f"`{code}` failed:\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    "A copy of the repository, its modules deleted, then cleaned and exported again"
    tmp = tmp_path_factory.mktemp("house")
    copy = tmp / "repo"
    skip = shutil.ignore_patterns("__pycache__", "weights", ".ipynb_checkpoints", "*_files")
    for d in ("nbs", "t2v_turbo"):
        shutil.copytree(ROOT / d, copy / d, ignore=skip)
    for f in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        if (ROOT / f).exists():
            shutil.copy(ROOT / f, copy / f)
    for p in (copy / "t2v_turbo").rglob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    python("from nbdev.doclinks import nbdev_export; "
           "from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()", copy, tmp)
    return copy


def test_there_is_something_to_check():
    assert len(notebooks) >= 12, f"only {len(notebooks)} notebooks in nbs/"
    assert len(modules) >= 12, f"only {len(modules)} modules in t2v_turbo/"


# --- exports and order ---------------------------------------------------------------------------

def test_modules_are_what_the_notebooks_export(regenerated):
    def tree(d):
        return {p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob("*.py")}
    have, want = tree(LIB), tree(regenerated / "t2v_turbo")
    assert not (lost := sorted(want.keys() - have.keys())), f"not exported yet: {lost}"
    assert not (stray := sorted(have.keys() - want.keys())), f"no notebook exports {stray}"
    stale = sorted(k for k in want if have[k] != want[k])
    assert not stale, f"t2v_turbo/{stale} differ from their notebooks; run nbdev_export"


def imported(code, module):
    "Modules of this package that `code`, exported as `module`, imports"
    package = ["t2v_turbo", *module.split(".")[:-1]]
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import):
            names = [a.name.split(".") for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = package[:len(package) + 1 - n.level] if n.level else []
            base = base + (n.module.split(".") if n.module else [])
            names = [[*base, a.name] for a in n.names] + [base]
        else:
            continue
        yield from (".".join(x[1:]) for x in names if x[0] == "t2v_turbo" and len(x) > 1)


@each_numbered
def test_notebook_imports_only_from_earlier_ones(nb):
    order = {module_of(p): i for i, p in enumerate(numbered)}
    mine = module_of(nb)
    at = numbered.index(nb)
    if not mine:                               # it only reads, and only what a reader has read before it
        assert not any(map(is_export, cells(nb))), f"{nb.name} exports, and has no `#| default_exp`"
        code = [src(c) for c in cells(nb) if c["cell_type"] == "code"]
        late = sorted({m for s in code for m in imported(s, "") if order.get(m, -1) > at})
        assert not late, f"{nb.name} imports from later notebooks: {late}"
        return
    code = [src(c) for c in cells(nb) if is_export(c)]
    py = LIB / (mine.replace(".", "/") + ".py")
    code += [py.read_text(encoding="utf-8")] if py.exists() else []
    names = {m for s in code for m in imported(s, mine)} & order.keys() - {mine}
    late = sorted(m for m in names if order[m] >= order[mine])
    assert not late, f"{nb.name} ({mine}) imports from later notebooks: {late}"


@each_other
def test_other_notebooks_import_and_never_export(nb):
    bad = [i for i, c in enumerate(cells(nb)) if is_export(c)]
    assert not bad, f"{rel(nb)} is not numbered but exports cells {bad}"
    assert module_of(nb) is None, f"{rel(nb)} is not numbered but has a default_exp"


def behind(module, found=None):
    "A module and all modules of this package that importing it imports"
    found = set() if found is None else found
    py = LIB / (module.replace(".", "/") + ".py")
    if module in found or not py.exists():
        return found
    found.add(module)
    top = ast.Module([n for n in ast.parse(py.read_text(encoding="utf-8")).body
                      if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    for m in imported(ast.unparse(top), module):
        behind(m, found)
    return found


@pytest.mark.parametrize("module, most", [("distill", 1500), ("student", 1100)])
def test_the_method_has_few_dependencies(module, most):
    "What a reader of the paper on one page reads with it: no data, no files of weights, no hub"
    found = behind(module)
    assert {"files", "core", "schedule", "solver", "consistency", "teachers.base"} <= found
    far = {"streams", "caches", "data", "hub", "saved", "identity", "world", "pipeline", "train"}
    for m in found:
        assert m.split(".")[0] not in far, f"{module} imports {m}"
        assert m.partition("teachers.")[2] in ("", "base"), f"{module} imports {m}"
    lines = {m: len((LIB / (m.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines()) for m in found}
    assert sum(lines.values()) <= most, f"{sum(lines.values())} lines behind {module}: {lines}"


# --- notebooks -----------------------------------------------------------------------------------

@each_nb
def test_notebook_is_small(nb):
    kb = nb.stat().st_size / 1000
    assert kb < 600, f"{rel(nb)} has {kb:.0f} kB; the limit is 600"


@each_nb
def test_notebook_is_clean(nb, regenerated):
    same = nb.read_bytes() == (regenerated / rel(nb)).read_bytes()
    assert same, f"{rel(nb)} is not clean; run nbdev_clean"


@each_nb
def test_notebook_stores_its_outputs(nb):
    code = [c for c in cells(nb) if c["cell_type"] == "code"]
    outs = [o for c in code for o in c["outputs"]]
    errors = [o["ename"] for o in outs if o["output_type"] == "error"]
    assert not errors, f"{rel(nb)} stores error output: {errors}"
    if nb in others and not code:
        return
    assert outs, f"{rel(nb)} stores no outputs; run it from top to bottom"
    plots = re.compile(r"\b(plt\.|ax\.|axs?\[|show_strips\()")
    if any(plots.search(src(c)) and not is_export(c) for c in code):
        images = [o for o in outs if {"image/png", "image/svg+xml"} & o.get("data", {}).keys()]
        assert images, f"{rel(nb)} plots but stores no image"


@each_nb
def test_notebook_stores_no_bar_and_no_widget(nb):
    "Both are dead without a kernel; `python tools/execute.py --clean` drops them"
    assert not execute.clean(json.loads(nb.read_text(encoding="utf-8"))), f"{rel(nb)} stores a progress bar or a widget; run python tools/execute.py --clean"


def test_bars_are_dropped_and_the_rest_stays():
    out = lambda s: dict(output_type="stream", name="stderr", text=s)
    bar, print_, both = out("\r  0%|          | 0/4 [00:00<?, ?it/s]\r100%|##########| 4/4"), out("loss 50% | lower\n"), out("saved\n 10%|#  | 1/10\nread\n")
    widget = dict(output_type="display_data", metadata={}, data={execute.WIDGET: {}, "text/plain": "HBox()"})
    nb = dict(metadata=dict(widgets={}, kernelspec={}), cells=[dict(cell_type="code", source="", outputs=[bar, print_, widget, both])])
    assert execute.clean(nb) and nb["metadata"] == dict(kernelspec={})
    assert ["".join(o["text"]) for o in nb["cells"][0]["outputs"]] == ["loss 50% | lower\n", "saved\nread\n"]
    assert not execute.clean(nb)


@each_nb
def test_a_cell_that_imports_can_be_executed_for_the_site(nb):
    "The site's build executes what is exported or imports, and nothing else: such a cell uses no name of another one"
    known = {*vars(builtins), "__name__"}
    for i, c in enumerate(cells(nb)):
        code = "\n".join(s for s in src(c).splitlines() if not s.lstrip().startswith(("%", "!")))
        if c["cell_type"] != "code" or re.search(r"#\|\s*eval:\s*false", code): continue
        tree = ast.parse(code)
        imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree))
        if not is_export(c) and not imports: continue
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        bound = lambda ns: ({n.id for n in ns if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {n.arg for n in ns if isinstance(n, ast.arg)}
                            | {n.name for n in ns if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
                            | {(a.asname or a.name).split(".")[0] for n in ns if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names})
        top = [m for n in tree.body for m in ([n] if isinstance(n, (ast.FunctionDef, ast.ClassDef)) else ast.walk(n))]
        lost = {n.id for n in names} - known - bound(list(ast.walk(tree)))
        known |= bound(top)
        assert is_export(c) or not lost, f"{rel(nb)} cell {i} imports and uses {', '.join(sorted(lost))}: import in a cell of its own"


@each_nb
def test_export_cells_are_short(nb):
    for i, c in enumerate(cells(nb)):
        if not is_export(c):
            continue
        lines = src(c).splitlines()
        code = [s for s in lines if s.strip() and not s.lstrip().startswith("#")]
        assert len(code) <= 40, f"{rel(nb)} cell {i} exports {len(code)} lines of code (40 allowed)"
        wide = [s for s in lines if len(s) > 100]
        assert not wide, f"{rel(nb)} cell {i} has a line of {len(wide[0])} columns: {wide[0][:60]}.."


def test_readme_is_the_rendered_index():
    if not (NBS / "index.ipynb").exists():
        pytest.skip("no nbs/index.ipynb yet")
    python("import runpy, sys; sys.argv = ['readme.py', '--check']; "
           "runpy.run_path('tools/readme.py', run_name='__main__')", ROOT)


# --- modules -------------------------------------------------------------------------------------

@each_module
def test_no_banned_import_and_no_unsafe_loading(py):
    for n in ast.walk(ast.parse(py.read_text(encoding="utf-8"))):
        at = f"{rel(py)}:{getattr(n, 'lineno', 0)}"
        names = [a.name for a in n.names] if isinstance(n, ast.Import) else []
        names += [n.module or ""] if isinstance(n, ast.ImportFrom) else []
        bad = {s.split(".")[0] for s in names} & BANNED
        assert not bad, f"{at} imports {sorted(bad)}"
        if not isinstance(n, ast.Call):
            continue
        kw = {k.arg: ast.unparse(k.value) for k in n.keywords}
        safe = ast.unparse(n.func) != "torch.load" or kw.get("weights_only") == "True"
        assert safe, f"{at} calls torch.load without weights_only=True"
        assert kw.get("allow_pickle", "False") == "False", f"{at} allows pickle"


def test_the_package_and_its_mathematics_do_without_diffusers():
    light = ("core", "schedule", "gaussian", "solver", "consistency", "sprites", "world")
    names = ["t2v_turbo"] + [f"t2v_turbo.{m}" for m in light if (LIB / f"{m}.py").exists()]
    check = "; assert 'diffusers' not in sys.modules, '{0} imports diffusers'"
    python("; ".join(["import sys", *(("import {0}" + check).format(m) for m in names)]), ROOT)


def public(py):
    "Functions and classes of a module's `__all__`, as syntax trees"
    tree = ast.parse(py.read_text(encoding="utf-8"))
    names = {ast.literal_eval(e) for n in tree.body if isinstance(n, ast.Assign)
             and ast.unparse(n.targets[0]) == "__all__" for e in n.value.elts}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in tree.body if isinstance(n, kinds) and n.name in names]


@each_module
def test_public_names_have_docstrings(py):
    bare = [n.name for n in public(py) if not ast.get_docstring(n)]
    assert not bare, f"{rel(py)}: no docstring on {bare}"


@each_module
def test_public_parameters_are_annotated_or_explained(py):
    lines = py.read_text(encoding="utf-8").splitlines()
    bare = []
    for n in public(py):
        inits = [m for m in n.body if getattr(m, "name", "") == "__init__"]
        for f in inits if isinstance(n, ast.ClassDef) else [n]:
            a = f.args
            for p in [*a.posonlyargs, *a.args, *a.kwonlyargs]:
                explained = re.search(r"#\s*\S", lines[p.lineno - 1])
                if p.arg not in ("self", "cls") and not p.annotation and not explained:
                    bare.append(f"{n.name}({p.arg})")
    assert not bare, f"{rel(py)}: neither annotation nor comment on {bare}"


# --- one way through the house -------------------------------------------------------------------

LONGEST, PARAMETERS = 450, 8                        # lines of a module, parameters of a function


@each_nb
def test_a_link_has_the_number_of_its_notebook(nb):
    "`[notebook 64](64_surrogate.ipynb)`, and `[64](..)` likewise"
    text = "".join(src(c) for c in cells(nb) if c["cell_type"] == "markdown")
    links = re.findall(r"\[(?:[Nn]otebooks? )?(\d\d)\b[^\]]*\]\([^)]*?(\d\d)_\w+\.ipynb", text)
    assert [l for l in links if l[0] != l[1]] == []


def test_the_sidebar_is_in_the_order_of_numbers():
    yaml = pytest.importorskip("yaml")
    bar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    shown = [n for s in bar for n in s["contents"] if re.match(r"\d\d", n)]
    assert shown == [p.name for p in numbered], "nbs/sidebar.yml does not list the numbered notebooks in their order"


def test_the_parts_of_the_house_are_those_of_the_sidebar():
    "CONTRIBUTING's table has the first and last number of each part"
    yaml = pytest.importorskip("yaml")
    bar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    found = [[n[:2] for n in part["contents"] if isinstance(n, str) and n[:2].isdigit()] for part in bar]
    found = [n[0] if len(n) == 1 else f"{n[0]}-{n[-1]}" for n in found if n]
    table = re.findall(r"^\|[^|]+\| (\d\d(?:-\d\d)?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
    assert table == found


@each_module
def test_module_can_be_read_in_one_sitting(py):
    lines = len(py.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{rel(py)} has {lines} lines ({LONGEST} allowed)"


@each_module
def test_functions_have_few_parameters(py):
    "Constructors of networks, teachers and pipelines keep the arguments that diffusers saves by name"
    many = []
    for f in ast.walk(ast.parse(py.read_text(encoding="utf-8"))):
        if not isinstance(f, ast.FunctionDef): continue
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        if len(names) > PARAMETERS and f.name not in ("__call__", "__init__"): many.append(f"{f.name} ({len(names)})")
    assert not many, f"{rel(py)}: more than {PARAMETERS} parameters: {', '.join(many)}"


GLOBAL = {"torch": {"manual_seed", "seed", "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like"},
          "random": {"random", "seed", "shuffle", "choice", "choices", "sample", "randint", "uniform", "gauss"},
          "np.random": {"seed", "rand", "randn", "randint", "random", "choice", "shuffle", "permutation", "normal", "uniform"}}


def uses_the_global_generator(tree):
    """Calls that read or set a generator that every library shares; those that are given one do not.

    Constructors and initialisers draw as PyTorch's own do; `core.seeded` surrounds them.
    """
    free = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "seeded")
            or isinstance(f, ast.With) and any(ast.unparse(i.context_expr).startswith("seeded(") for i in f.items)]
    exempt = {id(n) for f in free for n in ast.walk(f)}
    for n in ast.walk(tree):
        if id(n) in exempt or isinstance(n, ast.Call) and ast.unparse(n.func).startswith(("nn.init.", "torch.nn.init.")): continue
        if not isinstance(n, ast.Call) or not isinstance(n.func, ast.Attribute): continue
        of = ast.unparse(n.func.value)
        if n.func.attr in GLOBAL.get(of, ()) and "generator" not in {k.arg for k in n.keywords}: yield f"{n.lineno}: {ast.unparse(n)[:60]}"
        if n.func.attr in ("normal_", "uniform_", "random_", "bernoulli_") and "generator" not in {k.arg for k in n.keywords}:
            yield f"{n.lineno}: {ast.unparse(n)[:60]}"


@each_module
def test_no_call_of_a_global_generator(py):
    found = list(uses_the_global_generator(ast.parse(py.read_text(encoding="utf-8"))))
    assert not found, f"{rel(py)} draws from a global generator: {found}"


@pytest.mark.parametrize("code, found", [("torch.rand(2)", 1), ("torch.rand(2, generator=g)", 0), ("torch.manual_seed(0)", 1),
                                         ("x.normal_()", 1), ("np.random.default_rng(0).normal()", 0), ("random.Random(0).random()", 0),
                                         ("with seeded(0): torch.rand(2)", 0)])
def test_a_global_draw_is_found(code, found):
    assert len(list(uses_the_global_generator(ast.parse(code)))) == found


def test_train_knows_no_engine():
    "Its code, without comments and strings that are documentation, names an engine in one function at most: the one that chooses"
    tree = ast.parse((LIB / "train.py").read_text(encoding="utf-8"))
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(n): n.body = n.body[1:] or [ast.Pass()]
    named = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) if re.search(r"fsdp|deepspeed|zero\d|zero_", ast.unparse(f), flags=re.I)
             and "zero_grad" not in ast.unparse(f)}
    assert len(named) <= 1, f"t2v_turbo/train.py names an engine in {sorted(named)}"


def test_ruff_has_nothing_to_report():
    ruff = shutil.which("ruff") or pytest.skip("ruff is not installed: pip install -e '.[dev]'")
    run = subprocess.run([ruff, "check", "--no-cache", "--output-format", "concise", "."], cwd=ROOT, text=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert run.returncode == 0, f"run `ruff check --fix`:\n{run.stdout[-3000:]}{run.stderr}"


def test_a_notebook_between_two_others():
    "tools/renumber.py moves what follows, and every mention of it"
    import runpy
    tool = runpy.run_path(ROOT / "tools" / "renumber.py")
    numbers, renamed = tool["numbers"], tool["renamed"]
    new = numbers(["00_a.ipynb", "01_b.ipynb", "00b_new.ipynb", "02_c_d.ipynb", "api.ipynb"])
    assert new == {"00_a": "00_a", "00b_new": "01_new", "01_b": "02_b", "02_c_d": "03_c_d"}
    book = "notebook"                                                     # so that the tool leaves these lines alone
    assert renamed(f"[{book} 01](01_b.ipynb#x), 02_c_d.html, {book.title()} 00b, {book} 87, 01 b", new) == (
        f"[{book} 02](02_b.ipynb#x), 03_c_d.html, {book.title()} 01, {book} 87, 01 b")
