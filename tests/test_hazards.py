"Damaged, hostile and odd inputs: each is one clear line, and nobody else's run suffers"
import json

import pytest

from mechunlearn import runs, store
from mechunlearn.store import Broken, Refusal, Run, Unavailable


# ---- what is not available

def test_notes_are_kept_taken_back_and_read(tmp_path):
    run = Run(tmp_path, "m", "r", "t", {})
    store.note(None, "localization", "flu", "no relation"); store.note(Run(None, "m", "r", "t", {}), "localization", "flu", "no relation")
    assert store.notes(tmp_path) == {}
    store.note(run, "localization", "flu", "no relation"); store.note(run, "localization", "flu-path", "nobody to swap with"); store.note(run, "latent", "probe", "no retain")
    assert store.notes(tmp_path) == {"localization": {"flu": "no relation", "flu-path": "nobody to swap with"}, "latent": {"probe": "no retain"}}
    store.note(run, "localization", "flu", None); store.note(run, "latent", "probe", None); store.note(run, "never", "x", None)
    assert store.notes(tmp_path) == {"localization": {"flu-path": "nobody to swap with"}}


def test_notes_of_processes_side_by_side_are_all_kept(tmp_path):
    import subprocess, sys
    code = "import sys; from mechunlearn.store import Run, note; [note(Run(sys.argv[1], 'm', 'r', 't', {}), 'relearning', f'{sys.argv[2]}-{k}', 'x') for k in range(20)]"
    ps = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [p.wait(60) for p in ps] == [0, 0, 0] and len(store.notes(tmp_path)["relearning"]) == 60


@pytest.mark.parametrize("text", ["", "[]", "{", "\0\1"])
def test_damaged_notes_are_named_and_written_again(tmp_path, text):
    run = Run(tmp_path, "m", "r", "t", {})
    store.note(run, "latent", "probe", "no retain")
    (tmp_path / "notes/latent.json").write_text(text)
    with pytest.raises(Broken, match="latent.json"): store.notes(tmp_path)
    store.note(run, "latent", "probe", "no retain")
    assert store.notes(tmp_path) == {"latent": {"probe": "no retain"}}


def test_refusals_of_every_kind_are_known_by_name():
    assert {"Refusal", "Broken", "Unavailable", "EmptyFLU", "NoExtraction", "Missing"} <= set(runs.REFUSALS)
    source = "class A(Refusal):\n    pass\nclass B(store.A, Other): pass\nclass C(Exception): pass\nclass Refusal(Exception): pass"
    assert runs._named_below("Refusal", [source]) == ("A", "B", "Refusal")
    assert runs.explain("Unavailable", "no relation") == ("no relation", True) and issubclass(Unavailable, Refusal)
