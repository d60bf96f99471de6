"Reads settings.ini, the only place for metadata and requirements."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_name"]
weights = here / lib / "weights"

statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable",
            "6 - Mature", "7 - Inactive"]
licenses = {"apache2": "Apache-2.0"}
readme = here / "README.md"

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license=licenses[cfg["license"]],
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    classifiers=[f"Development Status :: {statuses[int(cfg['status']) - 1]}",
                 f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}"]
                + [f"Programming Language :: Python :: {v}" for v in cfg["py_versions"].split()],
    # Folders of data count as packages: setuptools wants every folder that it installs named.
    packages=find_namespace_packages(include=[lib, f"{lib}.*"], exclude=["*.__pycache__"]),
    include_package_data=False,
    package_data={lib: ["py.typed"], f"{lib}.published": ["*.csv"],
                  f"{lib}.tables": ["*.json"],
                  f"{lib}.page": ["*.html", "*.css", "*.js", "*.md"],
                  **{f"{lib}.weights{sub}": ["*.safetensors", "*.json", "*.md"]
                     for sub in ("", *("." + ".".join(p.relative_to(weights).parts)
                                       for p in sorted(weights.rglob("*")) if p.is_dir()))}},
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items()
                    if k.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{lib}={lib}._modidx:d"]},
    zip_safe=False,
)
