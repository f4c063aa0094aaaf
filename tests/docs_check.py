"""What can be said of the docs without Quarto: exports and notebooks are clean, every page converts, every link leads somewhere.

    python tests/docs_check.py [exports | pages]

`exports` writes files anew, if only as they were: nothing may read them meanwhile. `pages` reads alone, and may go on beside the tests.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def fail(message: str) -> None:
    sys.exit(f"docs-check: {message}")


def snapshot() -> dict[str, bytes]:
    files = [*ROOT.glob("mechunlearn/*.py"), *NBS.glob("*.ipynb")]
    return {str(f.relative_to(ROOT)): f.read_bytes() for f in files}


def exports_are_clean() -> None:
    before = snapshot()
    bin_dir = Path(sys.executable).parent
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([bin_dir / tool], cwd=ROOT, check=True, capture_output=True)
    changed = [name for name, content in snapshot().items() if before.get(name) != content]
    if changed:
        fail(f"nbdev_export or nbdev_clean changed {', '.join(changed)}: run both and commit")
    long = [f.name for f in ROOT.glob("mechunlearn/[!_]*.py") if len(f.read_text().splitlines()) > 900]
    if long:
        fail(f"{', '.join(long)} has more than 900 lines: split its notebook")


def readme_is_the_index() -> None:
    import make_readme

    text, figures = make_readme.render()
    stale = [name for name, png in figures.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != png]
    if (ROOT / "README.md").read_text() != text or stale:
        fail("README.md is not what nbs/index.ipynb gives: run `make readme` and commit")


def sidebar_is_whole() -> None:
    named = re.findall(r"[\w/]+\.ipynb", (NBS / "sidebar.yml").read_text())
    pages = sorted(p.name for p in NBS.glob("*.ipynb"))
    if sorted(named) != pages:
        fail(f"sidebar.yml names {sorted(named)}, nbs/ holds {pages}")
    for name in ("_quarto.yml", "nbdev.yml", "sidebar.yml"):
        yaml.safe_load((NBS / name).read_text())


def notebooks_are_recorded() -> None:
    size = 0
    for path in sorted(NBS.glob("*.ipynb")):
        size += path.stat().st_size
        notebook = nbformat.read(path, 4)
        tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
        if "injected-parameters" in tags:
            fail(f"{path.name} holds an injected-parameters cell")
        for cell in notebook.cells:
            for out in cell.get("outputs", []):
                if out.output_type == "error":
                    fail(f"{path.name} stores a traceback")
                if out.output_type == "stream" and out.name == "stderr":
                    fail(f"{path.name} stores stderr")
                if re.search(r"/(home|root|tmp|Users)/", json.dumps(out.get("text", out.get("data", {}).get("text/plain", "")))):
                    fail(f"{path.name} shows an absolute path of the machine that ran it")
    if size > 6e6:
        fail(f"nbs/ holds {size / 1e6:.1f} MB of notebooks, the limit is 6")


def pages_convert() -> None:
    from nbconvert import MarkdownExporter

    exporter = MarkdownExporter()
    pages = {p.stem for p in NBS.glob("*.ipynb")}
    for path in sorted(NBS.glob("*.ipynb")):
        exporter.from_filename(str(path))
        source = "".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", source):
            if target.startswith(("http", "mailto")):
                continue
            stem = Path(target).stem
            if Path(target).suffix in (".ipynb", ".html") and stem not in pages:
                fail(f"{path.name} links to {target}, which is not a page")
            if Path(target).suffix not in (".ipynb", ".html") and not (NBS / target).exists():
                fail(f"{path.name} links to {target}, which does not exist")


def pages_are_processed() -> None:
    "As Quarto would get them: what they show of the library is executed"
    code = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        fail("nbdev's page processing failed:\n" + ran.stderr[-2000:])


def outside(text: str) -> str:
    "A Markdown text without its code blocks"
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def built_pages_are_right() -> None:
    from mechunlearn.pages import opening

    pages = {p: nbformat.read(p, 4).cells for p in sorted((ROOT / "_proc").glob("*.ipynb"))}
    shown = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem): re.findall(r"^show_doc\((\w+)", "\n".join(c.source for c in cells), re.M) for p, cells in pages.items()}
    for path, cells in pages.items():
        titles = [c.source for c in nbformat.read(NBS / path.name, 4).cells if c.source.startswith("# ")]
        if titles and (words := opening(titles[0])[1].split("\n")[0]) and words.split("`")[0] not in "".join(c.source for c in cells):
            fail(f"the first words of {path.name} are not on its page")
        for cell in cells:
            texts = [cell.source] if cell.cell_type == "markdown" else ["".join(o.get("data", {}).get("text/markdown", "")) for o in cell.get("outputs", [])]
            if any(re.search(r"\]\((http|\w+\.html)", block) for text in texts for block in re.findall(r"^```.*?^```", text, re.M | re.S)):
                fail(f"a code block of {path.name} holds a Markdown link")
            for page, anchor in re.findall(r"\]\((\w+)\.html#([\w.]+)\)", outside("\n\n".join(texts))):
                if anchor not in map(str.lower, shown.get(page, ())):
                    fail(f"{path.name} links to {page}.html#{anchor}, which the site does not show")
            if cell.cell_type == "code" and "fig-alt:" not in cell.source and any("image/png" in o.get("data", {}) for o in cell.outputs):
                fail(f"{path.name} shows a figure without a description")


PARTS = {"exports": (exports_are_clean,), "pages": (readme_is_the_index, sidebar_is_whole, notebooks_are_recorded, pages_convert, pages_are_processed, built_pages_are_right)}

if __name__ == "__main__":
    for check in (check for part in sys.argv[1:] or PARTS for check in PARTS[part]):
        check()
        print(f"docs-check: {check.__name__.replace('_', ' ')}", flush=True)
