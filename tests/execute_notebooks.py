"""Re-execute the notebooks of nbs/ in place (`make notebooks`): slow cells keep their outputs, stderr is dropped, pictures get a palette.

    python tests/execute_notebooks.py [NAME.ipynb ...] [--small]

With --small nothing is executed: pictures and tables that are there are made small.
"""
import base64
import copy
import io
import re
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image
from zopfli.png import optimize

NBS = Path(__file__).resolve().parents[1] / "nbs"
SKIP = {"#| slow", "#| gpu", "#| notest", "#| eval: false"}
COLOURS, ERROR = (8, 12, 16, 24, 32, 48, 64), 24  # of a picture; of 255


def runs(cell) -> bool:
    return not (cell.cell_type == "code" and SKIP & {line.strip() for line in cell.source.splitlines()[:6]})


def with_palette(data: bytes) -> bytes:
    """A picture in the fewest colours in which no pixel is off by more than ERROR, and the background not at all."""
    picture, out = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    there = picture.getcolors(picture.width * picture.height)
    ground, pixels = max(there)[1], np.asarray(picture, int)
    for n in COLOURS:
        if n >= len(there):
            return data
        small = picture.quantize(n, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        off = np.abs(np.asarray(small.convert("RGB"), int) - pixels).max(-1)
        if off.max() <= ERROR and not off[(pixels == ground).all(-1)].any():
            break
    small.save(out, "PNG", optimize=True)
    return min(data, out.getvalue(), key=len)


def small_picture(png: str) -> str:
    """A picture with a palette, packed as tightly as it goes."""
    data = with_palette(base64.b64decode(png))
    return base64.b64encode(min(data, optimize(data), key=len)).decode()


def without_unused(html: str) -> str:
    """Without the rules of a style sheet for classes that nothing has."""
    style, end, body = html.partition("</style>")
    used = {name for classes in re.findall(r'class="([^"]*)"', body) for name in classes.split()}
    return re.sub(r"\n\s*#\w+ \.(gt_\w+)[^{}]*\{[^}]*\}", lambda rule: rule[0] if rule[1] in used else "", style) + end + body


def small_table(html: str) -> str:
    """Without what pandas and great_tables say again for each table or cell, and without a Styler's names of cells (new each time) where no rule is for them."""
    html = without_unused(re.sub(r'<style scoped>.*?</style>| headers="[^"]*"', "", html, flags=re.DOTALL))
    if '<style type="text/css"></style>' in (html := re.sub(r">\s*\n\s*<", "><", html)):
        html = re.sub(r'<style type="text/css"></style>| (id|class)="[^"]*"', "", html)
    return html


def make_small(notebook) -> None:
    notebook.metadata.pop("widgets", None)  # progress bars that nobody sees
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        data = output.get("data", {})
        if png := data.get("image/png"):
            data["image/png"] = small_picture(png)
        if html := data.get("text/html"):
            data["text/html"] = small_table(html)
        if {"image/png", "text/html", "text/markdown"} & {*data}:
            data.pop("text/plain", None)  # the name of a figure's class, or a table once more


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
    names = [name for name in sys.argv[1:] if name != "--small"]
    for path in [NBS / name for name in names] or sorted(NBS.glob("*.ipynb")):
        start = time.time()
        if "--small" in sys.argv:
            notebook = nbformat.read(path, 4)
            make_small(notebook)
            nbformat.write(notebook, path)
        else:
            execute(path)
        print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
