"Faults that a run folder must survive, and those it must report by name"
import json, os, signal, subprocess, sys, textwrap, threading

import numpy as np, pandas as pd, pytest, torch

from mechunlearn import store
from mechunlearn.store import Broken, Refusal, Run, cause_hash, choose, make, save_json, save_table, sidecar, state

CAUSES = {"lr": 1e-3, "seed": 0}
KINDS = {"parquet": pd.DataFrame({"fact": ["a", "b"], "value": [.25, .5], "step": pd.array([1, None], dtype="Int64")}),
         "safetensors": {"w": torch.arange(6.).reshape(2, 3).T},
         "json": {"name": "flu", "components": ["mlp.1"], "n": np.int64(3)}}


@pytest.fixture(params=KINDS)
def artefact(request, tmp_path):
    path = tmp_path / "deep" / f"thing.{request.param}"
    store.SAVE[path.suffix](path, KINDS[request.param], CAUSES)
    return path


def load(path): return store.LOAD[path.suffix](path)


def test_round_trip(artefact):
    back, put = load(artefact), KINDS[artefact.suffix[1:]]
    if artefact.suffix == ".parquet": pd.testing.assert_frame_equal(back, put)
    elif artefact.suffix == ".safetensors": assert torch.equal(back["w"], put["w"])
    else: assert back == {**put, "n": 3}
    assert state(artefact, CAUSES) == "done"
    assert sorted(p.name for p in artefact.parent.iterdir()) == [artefact.name, sidecar(artefact).name]


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "append"])
def test_damaged_bytes_are_named(artefact, damage):
    data = artefact.read_bytes()
    middle = len(data) // 2
    artefact.write_bytes({"truncate": data[:middle], "empty": b"", "append": data + b"\n",
                          "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]}[damage])
    assert state(artefact, CAUSES) == "broken"
    for read in (lambda: load(artefact), lambda: make(artefact, CAUSES, lambda: 1 / 0)):
        with pytest.raises(Broken, match=artefact.name) as e: read()
        assert "--recompute" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("alter", [
    lambda m: {**m, "hash": "0" * 16}, lambda m: {**m, "causes": {"lr": 2e-3}}, lambda m: {**m, "sha256": "0" * 64},
    lambda m: {**m, "schema": 0}, lambda m: {k: v for k, v in m.items() if k != "sha256"}, lambda m: {}, lambda m: [], lambda m: None])
def test_altered_sidecar_is_named(artefact, alter):
    meta = alter(json.loads(sidecar(artefact).read_text()))
    sidecar(artefact).write_text("{not json" if meta is None else json.dumps(meta))
    assert state(artefact, CAUSES) == "broken"
    with pytest.raises(Broken, match=artefact.name): load(artefact)


def test_recompute_repairs(artefact):
    artefact.write_bytes(b"x")
    make(artefact, CAUSES, lambda: KINDS[artefact.suffix[1:]], recompute=True)
    assert state(artefact, CAUSES) == "done"


def test_killed_between_file_and_sidecar(artefact, monkeypatch):
    real, names = os.replace, []
    def replace(a, b):
        names.append(str(b))
        if str(b).endswith(".meta.json"): raise KeyboardInterrupt
        real(a, b)
    monkeypatch.setattr(store.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt): store.SAVE[artefact.suffix](artefact, KINDS[artefact.suffix[1:]], {"lr": 2e-3})
    monkeypatch.undo()
    assert names == [str(artefact), str(sidecar(artefact))]
    assert state(artefact, {"lr": 2e-3}) == "missing" and state(artefact, CAUSES) == "missing"
    with pytest.raises(Broken, match="never finished"): load(artefact)
    assert not [p for p in artefact.parent.iterdir() if p.suffix == ".tmp"]


def test_killed_process_leaves_a_usable_folder(tmp_path):
    "SIGKILL at many moments of a loop of writes: never `broken`, and a second run finishes"
    path = tmp_path / "a.json"
    script = textwrap.dedent(f"""
        from mechunlearn.store import save_json
        print("go", flush=True)
        for k in range(10**6): save_json({str(path)!r}, list(range(5000)), {{"k": k % 2}})""")
    for moment in (0, .003, .01, .02, .05, .11):
        p = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        p.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired): p.wait(moment)
        p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
        assert state(path, {"k": 0}) in ("missing", "stale", "done")
        assert make(path, {"k": 5}, lambda: [moment]) == [moment]


def test_failed_write_keeps_no_temporary(tmp_path):
    with pytest.raises(TypeError): save_json(tmp_path / "x.json", object(), CAUSES)
    assert list(tmp_path.iterdir()) == []


def test_writers_in_one_process_do_not_share_a_temporary_name(tmp_path):
    path, seen = tmp_path / "t.json", []
    barrier = threading.Barrier(4)
    def write(tmp):
        seen.append(tmp.name); tmp.write_text(tmp.name); barrier.wait(10)
    threads = [threading.Thread(target=store._replace, args=(path, write)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(seen)) == 4 and path.read_text() in seen and list(tmp_path.iterdir()) == [path]


def test_stale_is_made_again_and_done_is_not(tmp_path):
    made = []
    def fn(): made.append(1); return {"n": len(made)}
    path = tmp_path / "x.json"
    got = [make(path, c, fn)["n"] for c in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 2})]
    assert got == [1, 1, 2, 2] and state(path, {"a": 1}) == "stale"


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(None, "m", "r", "t", {})
    assert make(run.path("x.json"), {}, lambda: 3) == 3 and run.edit_dir("flu", 0) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("a,b", [({"x": (1, 2)}, {"x": [1, 2]}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"s": {"q", "p"}}, {"s": {"p", "q"}}),
                                 ({"n": np.int64(3), "f": np.float64(.1)}, {"n": 3, "f": .1}), ({2: 0, 10: 1}, {"10": 1, "2": 0})])
def test_equal_causes_hash_equal(a, b): assert cause_hash(a) == cause_hash(b)


def test_different_causes_hash_differently(monkeypatch):
    some = [{}, {"a": 1}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": 1.5}, {"b": 1}, {"a": True}]
    assert len({cause_hash(c) for c in some}) == len(some)
    assert cause_hash({}) != cause_hash({}, schema=store.SCHEMA + 1)


def test_causes_that_are_not_values_are_refused():
    with pytest.raises(TypeError, match="cannot be a cause"): cause_hash({"f": lambda: 0})


def test_provenance_is_beside_the_hash_and_names_no_place(tmp_path, monkeypatch):
    path = save_table(tmp_path / "t.parquet", KINDS["parquet"], CAUSES)
    text = sidecar(path).read_text()
    assert json.loads(text)["provenance"]["packages"]["torch"] == str(torch.__version__)
    import socket
    assert str(tmp_path) not in text and socket.gethostname() not in text and str(os.getcwd()) not in text
    monkeypatch.setattr(store, "provenance", lambda: {"torch": "another"})
    assert state(path, CAUSES) == "done"


def test_a_run_folder_belongs_to_one_run(tmp_path):
    mine = ("m", "r1", "sports", {"forget_size": 16})
    Run(tmp_path / "a", *mine); Run(tmp_path / "a", *mine)
    for k, other in enumerate(("n", "r2", "counterfact", {"forget_size": 64})):
        yours = [*mine]; yours[k] = other
        with pytest.raises(Refusal, match="belongs to another run") as e: Run(tmp_path / "a", *yours)
        assert str(mine[k]) in str(e.value) and str(other) in str(e.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": "m"'])
def test_damaged_run_description_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Broken, match="run.json"): Run(tmp_path, "m", "r", "t", {})


@pytest.mark.parametrize("given,near", [("random-mlp", "random-mlps"), ("FLU", "flu"), ("nonlocalised", "nonlocalized")])
def test_choose_names_the_nearest(given, near):
    names = ["flu", "random-mlps", "nonlocalized"]
    assert choose(near, names, "localization") == near
    with pytest.raises(Refusal, match=f"did you mean '{near}'"): choose(given, names, "localization")
    with pytest.raises(Refusal, match="unknown localization 'zzz'. Valid: flu"): choose("zzz", names, "localization")


def test_refusals_survive_a_process_border():
    import pickle
    e = pickle.loads(pickle.dumps(Broken("a/b.parquet", "bad")))
    assert str(e) == str(Broken("a/b.parquet", "bad")) and e.code == 2


def test_time_is_divided_among_what_was_made_in_it(monkeypatch):
    clock = iter([0., 1., 4., 10.])
    monkeypatch.setattr(store.time, "perf_counter", lambda: next(clock))
    laps = store.Laps()
    laps.shared()
    two = pd.DataFrame(dict(evaluation="inside", setting=["lens", "lens", "top5", None]))
    assert laps(two) is two
    laps(two.iloc[:1])
    assert laps.on(two).attrs["took"] == {"shared": 1., "by": {"inside": {"lens": 7.5, "top5": .75, "": .75}}}
