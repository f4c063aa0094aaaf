"""Re-execute the notebooks of nbs/ in place (`make notebooks`): slow cells keep their outputs, stderr is dropped, pictures get a palette."""
import base64
import copy
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NBS = Path(__file__).resolve().parents[1] / "nbs"
SKIP = {"#| slow", "#| gpu", "#| notest", "#| eval: false"}


def runs(cell) -> bool:
    return not (cell.cell_type == "code" and SKIP & {line.strip() for line in cell.source.splitlines()[:6]})


def with_palette(png: str) -> str:
    """A picture in 96 colours, a third of the bytes; figures have fewer, but for the edges of letters."""
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(96, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(png, base64.b64encode(out.getvalue()).decode(), key=len)


def make_small(notebook) -> None:
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        if png := output.get("data", {}).get("image/png"):
            output["data"]["image/png"] = with_palette(png)


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
    make_small(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    paths = [NBS / name for name in sys.argv[1:]] or sorted(NBS.glob("*.ipynb"))
    for path in paths:
        start = time.time()
        execute(path)
        print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
