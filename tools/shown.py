"""nbdev's processing of a notebook for the site, with the code that it exports: `tools/docs.py` names `Shown` to nbdev

nbdev keeps the source of `#| exports` cells on the page and drops that of `#| export`. Here both stay: open in the part of
`sidebar.yml` that is the method, behind a fold elsewhere (`#| code-fold: true`, a directive that Quarto and smalldocs know).
"""
import ast
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, Processor

METHOD = "The method, in order"


def method(nbs):
    "Notebooks of the method, as the sidebar lists them"
    parts = yaml.safe_load((Path(nbs) / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return {n for s in parts if s["section"] == METHOD for n in s["contents"]}


def keeps(source):
    "Whether a cell defines something, rather than import names only"
    return any(not isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)


class exported(Processor):
    "Before nbdev's own processors: an exported cell that defines something is one of `exports`"
    def begin(self):
        for c in self.nb.cells:
            d = getattr(c, "directives_", {})
            if c.cell_type == "code" and "export" in d and keeps(c.source): d["exports"] = d.pop("export")


class folded(Processor):
    "After them: the source of an exported cell is open in the method and folded elsewhere"
    def begin(self):
        here = Path(self.nb.path_).name in method(get_config().nbs_path)
        for c in self.nb.cells:
            if c.cell_type != "code" or "exports" not in getattr(c, "directives_", {}): continue
            c.metadata["exported"] = "shown" if here else "folded"
            names = [n.name for n in ast.parse(c.source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            if not here: c.source = f'#| code-fold: true\n#| code-summary: "Source{" of " * bool(names)}{", ".join(names)}"\n{c.source}'


class Shown(FilterDefaults):
    def base_procs(self):
        own = [p for p in super().base_procs() if p.__name__ not in ("add_fold", "mv_exports")]
        return [exported, *own, folded]
