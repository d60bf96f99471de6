"Run the code cells of a notebook, one after another, in this process; IPython is all that it needs"
import contextlib
import importlib
import json
import pkgutil
import re
import sys

from IPython.core.interactiveshell import InteractiveShell

import t2v_turbo


class Shell(InteractiveShell):
    "A shell without a window"
    def enable_gui(self, gui=None): pass


def source(cell):
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def flags(src):
    "Words behind `#|`"
    return set(re.findall(r"^#\|\s*(\S+)", src, flags=re.M))


@contextlib.contextmanager
def tables_kept():
    "Put back what is in the tables of the package's modules: a notebook may register a teacher or a reward, the next test starts without it"
    names = [m.name for m in pkgutil.walk_packages(t2v_turbo.__path__, "t2v_turbo.") if "__main__" not in m.name]
    tables = [t for n in names for t in vars(importlib.import_module(n)).values() if isinstance(t, dict)]
    kept = [(t, dict(t)) for t in tables if "__builtins__" not in t]
    try: yield
    finally:
        for t, was in kept:
            t.clear()
            t.update(was)


def run_notebook(path, passed_over, root):
    "None, or the number of the first cell that fails, whose traceback is printed; cells under a flag of `passed_over` are not run"
    if str(root) not in sys.path: sys.path.insert(0, str(root))
    Shell.clear_instance()
    main, hook = sys.modules["__main__"], sys.displayhook
    shell = Shell.instance()
    shell.history_manager.enabled = False
    shell.run_line_magic("matplotlib", "inline")
    try:
        with tables_kept(), contextlib.chdir(path.parent):
            for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
                src = source(cell)
                if cell["cell_type"] != "code" or flags(src) & {*passed_over, "eval:"} or "nbdev_export(" in src: continue
                if not shell.run_cell(src).success: return i
    finally:
        Shell.clear_instance()
        sys.modules["__main__"], sys.displayhook = main, hook
