"""The page of errors holds every message of the code."""
import importlib
import re
from pathlib import Path

import mechunlearn
import pytest
from mechunlearn import errors
from mechunlearn.store import Refusal

FILES = sorted(Path(mechunlearn.__file__).parent.glob("[!_]*.py"))
TABLE = errors.messages()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_message_is_on_the_page(file):
    "Read another way: the first words that each error is raised with"
    said = " ".join(TABLE.message[TABLE.module == file.stem])
    for start in re.findall(r"""(?:Refusal|Unavailable|EmptyFLU|NoExtraction|Missing|Absent|ArgumentTypeError)\(f?(["'])(.+?)\1""", file.read_text()):
        for words in re.split(r"\{[^}]*\}+", start[1])[:1]:
            if len(words) > 6: assert words.strip() in said, f"{file.name}: {words!r} is not on the page of errors"


def test_every_kind_of_refusal_is_known():
    for file in FILES:
        if file.stem not in ("all", "cli"): importlib.import_module(f"mechunlearn.{file.stem}")
    def below(kind): return {kind} | {k for sub in kind.__subclasses__() for k in below(sub)}
    assert {k.__name__ for k in below(Refusal) if k.__module__.startswith("mechunlearn")} <= set(errors.ERRORS)


def test_every_module_has_a_cure_and_every_message_one():
    named = {m for modules in errors.ROOMS.values() for m in modules.split()}
    assert set(TABLE.module) <= named and TABLE.cure.str.len().min() > 4 and TABLE.message.str.len().min() > 6
    assert not TABLE.cure.str.startswith("change what").any() and TABLE.page.str.match(r"^[a-z_]+$").all()


@pytest.mark.parametrize("source,text", [('"a b"', "a b"), ('f"a {x + 1} b"', "a {x + 1} b"), ('"a " + "b"', "a b"), ('f"a" if x else "b"', "a"), ("why", "")])
def test_a_text_with_holes(source, text):
    assert errors.template(errors.ast.parse(source, mode="eval").body) == text


def test_what_is_said_by_functions_that_say_why():
    assert any("needs the package bitsandbytes" in m for m in TABLE.message)


def test_the_page_can_be_searched_and_is_safe():
    html = errors.page(TABLE, {"store": "Reference"})
    assert html.count("<tr><td>") == len(TABLE) and "<input" in html and "<{" not in html and '"your_own_facts.html"' in html
