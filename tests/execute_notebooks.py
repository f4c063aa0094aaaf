"""Re-execute the notebooks of nbs/ in place (`make notebooks`): slow cells keep their outputs, stderr is dropped."""
import copy
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"
SKIP = {"#| slow", "#| gpu", "#| notest", "#| eval: false"}


def runs(cell) -> bool:
    return not (cell.cell_type == "code" and SKIP & {line.strip() for line in cell.source.splitlines()[:6]})


def execute(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    kept = [cell for cell in notebook.cells if runs(cell)]
    part = copy.copy(notebook)
    part.cells = copy.deepcopy(kept)
    NotebookClient(part, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(NBS)}}).execute()
    for cell, done in zip(kept, part.cells, strict=True):
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in done.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        cell.execution_count = done.execution_count
    nbformat.write(notebook, path)


if __name__ == "__main__":
    paths = [NBS / name for name in sys.argv[1:]] or sorted(NBS.glob("*.ipynb"))
    for path in paths:
        start = time.time()
        execute(path)
        print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
