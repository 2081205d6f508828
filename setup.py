"""Metadata and extras of megallama. Exact versions are in constraints.txt.

NVIDIA apex is used where it is installed and must never be listed here: the package of that name on the public index is
something else.
"""

from setuptools import find_packages, setup

HF = ["transformers>=5", "tokenizers"]
MPI = ["mpi4py"]
# Readers of compressed and columnar text: large, and not needed for JSONL and plain text, so not required.
DATA = ["zstandard", "pyarrow"]
FIT = ["scipy"]  # to fit the planner's constants anew; planning itself needs none of it
BENCH = [*HF, "megatron-core"]

setup(
    name="megallama",
    version="0.1.0",
    description="A tensor x pipeline x data parallel training engine for Llama-2-shaped models",
    package_data={"megallama.plan": ["constants.yaml", "clusters/*.yaml"]},
    python_requires=">=3.10",
    packages=find_packages(include=["megallama", "megallama.*"]),
    install_requires=[
        "torch>=2.10",
        "numpy",
        "safetensors",
        "sentencepiece",
        "regex",
        "pyyaml",
        "jsonargparse>=4.40",
        "rich",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "hf": HF,
        "mpi": MPI,
        "data": DATA,
        "bench": BENCH,
        "fit": FIT,
        "dev": [
            *HF,
            *MPI,
            *DATA,
            *BENCH,
            *FIT,
            "mpich; sys_platform == 'linux'",  # an mpirun for the tests
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-regex",
        ],
    },
    entry_points={"console_scripts": ["megallama=megallama.cli:main"]},
)
