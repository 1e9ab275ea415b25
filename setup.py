"""Which folders make up the package; everything else about it stands in pyproject.toml."""

from setuptools import find_packages, setup


# Real folders at the top level, installed inside hf_mim. The links hf_mim/<name> serve a checkout that is not
# installed: they are excluded from the search, so that only this table decides what is packaged, and where from.
MAPPED = {"hf_mim.modeling": "modeling", "hf_mim.training": "training", "hf_mim.model_cards": "model_cards"}
OWN = find_packages(include=["hf_mim", "hf_mim.*"], exclude=[*MAPPED, *(f"{name}.*" for name in MAPPED)])
# Only the roots are mapped to folders: setuptools finds a sub-package below its parent's.
ROOMS = [f"hf_mim.training.{name}" for name in find_packages("training")]

setup(
    packages=[*OWN, *MAPPED, *ROOMS],
    package_dir={"hf_mim": "hf_mim", **MAPPED},
    package_data={
        "hf_mim": ["data/*.py", "data/fashion_mnist/*"],
        "hf_mim.analysis": ["report.html"],
        "hf_mim.training": ["recipes/*.yaml"],
        "hf_mim.model_cards": ["*.md"],
    },
    include_package_data=False,
)
