"""Package metadata comes from settings.ini, the one place nbdev reads too. The wheel carries the notebooks: they are the pipeline."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


class BuildWithNotebooks(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / cfg["lib_name"] / "nbs"
            target.mkdir(parents=True, exist_ok=True)
            for notebook in sorted((here / "nbs").glob("*.ipynb")):
                shutil.copy2(notebook, target)
            shutil.copytree(here / "nbs" / "recorded", target / "recorded", dirs_exist_ok=True)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["mechunlearn", "mechunlearn.*"]),
    package_data={"mechunlearn": ["data/*.csv", "data/organism/*", "data/organism-late/*", "data/organism-never-knew/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "peers", "capability", "slurm", "gguf", "gemma", "smollm2")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
