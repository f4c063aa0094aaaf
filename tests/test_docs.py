"""The rendered docs: which words link, where to, what figures say, and how the pages are grouped."""
import base64
import importlib
import io
import re
from configparser import ConfigParser
from pathlib import Path

import execute_notebooks
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from mechunlearn._modidx import d
from mechunlearn.pages import alt_text, home, linked, meant, opening

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {p.name: nbformat.read(p, 4).cells for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
FUNCTIONS = {full.removeprefix(f"{module}.") for module, names in d["syms"].items() for full in names}
SETTINGS = ConfigParser()
SETTINGS.read(ROOT / "settings.ini")


def page(notebook: str) -> str:
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook).replace(".ipynb", ".html")


def prose(cells) -> str:
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def linking(text: str, where: str) -> list[tuple[str, str]]:
    return re.findall(r"\[`([^`]+)`\]\((\w+\.html#[^)]+)\)", linked(text, where))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-")


def headings(cells) -> list[str]:
    return [slug(h) for h in re.findall(r"^#+ (.+)$", prose(cells), re.M)]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_words_do_not_link_to_functions_of_that_name(notebook):
    ordinary = [w for w, _ in linking(prose(NOTEBOOKS[notebook]), page(notebook)) if w.isalpha() and w.islower()]
    assert not ordinary, f"{notebook}: {ordinary} would lead to functions, though they may be mere words"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_links_lead_to_pages_of_the_site(notebook):
    pages = set(map(page, NOTEBOOKS))
    for word, target in linking(prose(NOTEBOOKS[notebook]), page(notebook)):
        assert target.partition("#")[0] in pages and word.removesuffix("()") in FUNCTIONS


def test_the_walk_would_notice():
    words = {w for cells in NOTEBOOKS.values() for w in re.findall(r"(?<!`)`([^`\s]+)`(?!`)", prose(cells))}
    tempting = sorted(w for w in words & FUNCTIONS if w.isalpha() and w.islower())
    assert {"late", "make", "edit"} & set(tempting) and not any(map(meant, tempting))
    assert any(home(w) and meant(w) for w in words), "names that are meant do link"


@pytest.mark.parametrize("text", [
    "```python\ndef f(\n    a:`Task`\n)\n```", "    x = `Task`", "### `Task`", "[`Task`](06_tasks.ipynb)", "``Task``", "`no_such_name`", "`_private`"])
def test_code_headings_and_links_stay_as_they_are(text):
    assert linked(text) == text


def test_a_name_links_without_the_published_address():
    assert linked("`Task`") == "[`Task`](facts.html#task)"
    assert not any(SETTINGS["DEFAULT"]["doc_host"] in prose(cells) for cells in NOTEBOOKS.values())


@pytest.mark.parametrize("source, parts", [
    ("# Store\n\n> What lasts\n\nFiles.", ("# Store\n\n> What lasts", "Files.")),
    ("# Store\n\n> What\n> lasts\n\nFiles.", ("# Store\n\n> What\n> lasts", "Files.")),
    ("# Store\n\nFiles.", ("# Store", "Files.")), ("# Store", ("# Store", "")), ("Files.", ("Files.", ""))])
def test_the_first_words_of_a_page_are_parted_from_its_title(source, parts):
    assert opening(source) == parts


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_figure_is_described(notebook):
    cells = NOTEBOOKS[notebook]
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            assert "![](" not in cell.source
        elif any("image/png" in o.get("data", {}) for o in cell.outputs):
            text = alt_text(cells, i)
            assert 20 < len(text) <= 320 and "`" not in text and "](" not in text, f"{notebook}, cell {i}: {text!r}"


def test_readme_describes_its_figures_and_links_to_files():
    text = (ROOT / "README.md").read_text()
    assert "![" in text and "![](" not in text
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_links_into_the_glossary_arrive_and_each_word_is_treated_somewhere():
    terms = headings(NOTEBOOKS["glossary.ipynb"])
    for name, cells in NOTEBOOKS.items():
        for anchor in re.findall(r"glossary\.ipynb#([\w-]+)", prose(cells)):
            assert anchor in terms, f"{name} asks the glossary for {anchor}"
    for entry in re.split(r"^### ", prose(NOTEBOOKS["glossary.ipynb"]), flags=re.M)[1:]:
        assert re.search(r"\]\(\d+_\w+\.ipynb\)", entry), f"no notebook treats {entry.splitlines()[0]}"


def test_the_sidebar_is_grouped_and_numbered():
    groups = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    assert [g["section"] for g in groups] == ["Start here", "Facts", "Localize", "Edit", "Attack", "Pipeline", "Reference"]
    for group in groups:
        numbers = [n[1] for entry in group["contents"] if (n := re.match(r"(\d+)_", entry["href"]))]
        assert numbers == sorted(numbers)
        assert all(entry["text"].startswith(n[1]) for entry in group["contents"] if (n := re.match(r"(\d+)_", entry["href"])))


def test_the_build_uses_our_links_and_leaves_sidebar_and_readme_alone():
    settings = SETTINGS["DEFAULT"]
    assert settings["skip_procs"] == "add_links" and settings["custom_sidebar"] == "True"
    for step in settings["procs"].split():
        module, name = step.split(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert not (ROOT / "nbs" / settings["readme_nb"]).exists(), "nbdev_docs would write README.md over ours"
    html = yaml.safe_load((ROOT / "_quarto.yml").read_text())["format"]
    assert list(html) == ["html"] and html["html"]["code-overflow"] == "wrap"


def test_the_workflow_tests_what_setup_supports():
    root = Path(__file__).resolve().parents[1]
    jobs = yaml.safe_load((root / ".github/workflows/test.yml").read_text())["jobs"]
    lowest = re.search(r"min_python = ([\d.]+)", (root / "settings.ini").read_text())[1]
    assert jobs["pinned"]["strategy"]["matrix"]["python"][0] == lowest
    targets = set(re.findall(r"^([\w.-]+):", (root / "Makefile").read_text(), re.M))
    assert {m for job in jobs.values() for step in job["steps"] for m in re.findall(r"make ([\w.-]+)", step.get("run", ""))} <= targets


def test_pictures_become_small_and_stay_what_they_show():
    shades = 255 - (2 * execute_notebooks.ERROR + 1) * np.arange(6)[::-1]  # a pale heat map with a smooth bar beside it, on white
    pixels = np.full((120, 300, 3), 255, np.uint8)
    for k, shade in enumerate(shades[:-1]):
        pixels[20:100, 10 + 30 * k:30 + 30 * k] = 255, shade, shade
    pixels[:, 240:] = np.stack([np.full(120, 255), np.linspace(0, 255, 120), np.linspace(0, 250, 120)], 1)[:, None].astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=0)
    png = base64.b64encode(out.getvalue()).decode()
    small = execute_notebooks.small_picture(png)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(small))).convert("RGB"), int)
    assert len(small) < len(png) / 2 and execute_notebooks.small_picture(small) == small
    assert np.abs(seen - pixels).max() <= execute_notebooks.ERROR and (seen[:20, :240] == 255).all()
    assert len({tuple(seen[60, 20 + 30 * k]) for k in range(5)}) == 5


def test_cells_of_a_table_are_named_only_for_rules():
    t = pd.DataFrame({"a": [1., 2.]})
    plain, coloured = t.style.format(precision=1), t.style.background_gradient()
    small = execute_notebooks.small_table(plain.to_html())
    assert small == execute_notebooks.small_table(t.style.format(precision=1).to_html()) and "1.0" in small and "id=" not in small
    kept = execute_notebooks.small_table(coloured.to_html())
    assert f"#T_{coloured.uuid}_row1_col0" in kept and f'id="T_{coloured.uuid}_row1_col0"' in kept
