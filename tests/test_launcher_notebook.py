"The ablation notebook starts two processes from inside Jupyter: its cells up to there, in a kernel of its own"
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import t2v_turbo

PATH = Path(t2v_turbo.__file__).resolve().parents[1] / "nbs" / "98_ablation.ipynb"


@pytest.mark.skipif(not PATH.is_file(), reason="the notebooks are not here")
def test_two_processes_from_jupyter(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1"); monkeypatch.setenv("PYTHONPATH", str(PATH.parents[1]))
    monkeypatch.delenv("IN_TEST", raising=False)
    nb = nbformat.read(PATH, 4)
    last, = (i for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.source.startswith("#| slow"))
    nb.cells = nb.cells[:last + 1]
    NotebookClient(nb, timeout=300, resources=dict(metadata=dict(path=os.fspath(PATH.parent)))).execute()
    said = "".join(o.get("text", "") for o in nb.cells[last].outputs)
    assert "3 steps on 2 process(es)" in said and "3 steps on 1 process(es)" in said
