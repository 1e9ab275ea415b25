"""Which folders make up the package. Everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup


# Top-level folders that install inside hf_mim. The links hf_mim/<name> only serve a checkout that is not installed, so
# they are excluded from the search: this table alone decides what is packaged, and from where.
MAPPED = {"hf_mim.modeling": "modeling", "hf_mim.training": "training", "hf_mim.model_cards": "model_cards"}
PLUGIN = find_packages(include=["hf_mim", "hf_mim.*"], exclude=[*MAPPED, *(f"{name}.*" for name in MAPPED)])
# setuptools looks for a sub-package below its parent's folder, so the parents alone are mapped to folders.
ROOMS = [f"hf_mim.training.{name}" for name in find_packages("training")]

setup(
    packages=[*PLUGIN, *MAPPED, *ROOMS],
    package_dir={"hf_mim": "hf_mim", **MAPPED},
    package_data={
        "hf_mim": ["data/*.py", "data/fashion_mnist/*"],
        "hf_mim.analysis": ["report.html"],
        "hf_mim.demo": ["page.html"],
        "hf_mim.new": ["*.txt"],
        "hf_mim.training": ["recipes/*.yaml"],
        "hf_mim.model_cards": ["*.md"],
    },
    include_package_data=False,
)
