"""README.md from nbs/index.ipynb, without Quarto: prose, shown code, figures with their descriptions, and Markdown outputs."""
import base64
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "nbs/index_files"


def alt(cells, number: int) -> str:
    from mechunlearn.pages import alt_text

    own = re.search(r'fig-alt: "(.*)"$', cells[number].source, re.M)
    return own[1] if own else alt_text(cells, number).replace("[", "(").replace("]", ")")


def outputs(cells, number: int, figures: dict[str, bytes]) -> list[str]:
    shown = []
    for out in cells[number].outputs:
        data = out.get("data", {})
        if "image/png" in data:
            name = f"{FIGURES}/figure-{len(figures) + 1}.png"
            figures[name] = base64.b64decode(data["image/png"])
            shown.append(f"![{alt(cells, number)}]({name})")
        elif "text/markdown" in data:
            shown.append(data["text/markdown"])
    return shown


def render() -> tuple[str, dict[str, bytes]]:
    "The README's text and its figures by path."
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", 4).cells
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+\.ipynb)", r"](nbs/\1", cell.source))
            continue
        lines = cell.source.splitlines()
        if not any(line.startswith("#|") and any(word in line for word in ("hide", "export", "default_exp", "echo: false")) for line in lines):
            code = "\n".join(line for line in lines if not line.startswith("#|")).strip()
            parts.append(f"```python\n{code}\n```")
        if not any("hide" in line for line in lines if line.startswith("#|")):
            parts += outputs(cells, number, figures)
    note = "<!-- Made from nbs/index.ipynb by tests/make_readme.py: edit that. -->"
    return "\n\n".join([note, *parts]) + "\n", figures


if __name__ == "__main__":
    text, figures = render()
    if "--check" in sys.argv:
        same = (ROOT / "README.md").read_text() == text and all((ROOT / name).read_bytes() == png for name, png in figures.items())
        sys.exit(0 if same else "README.md is not what nbs/index.ipynb gives: run `make readme`")
    (ROOT / FIGURES).mkdir(exist_ok=True)
    for name, png in figures.items():
        (ROOT / name).write_bytes(png)
    (ROOT / "README.md").write_text(text)
