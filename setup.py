from setuptools import find_packages, setup

setup(
    name="desc",
    version="0.1.0",
    description=(
        "Decoupled preference optimisation for emotional-support conversation, in plain PyTorch"
    ),
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["desc", "desc.*"]),
    package_data={"desc": ["data/*", "data/*/*"]},
    # What desc needs. The lower bounds were run (runs/install.sh --oldest), and all tests with what
    # stands in runs/constraints.txt. The upper bounds are the next major versions.
    install_requires=[
        "torch>=2.11.0,<3",
        "transformers>=5.17.0,<6",
        "safetensors>=0.8.0,<1",
        "sentencepiece>=0.2.0,<1",
        "tqdm>=4.60.0,<5",
    ],
    # Their bounds: the versions that were run.
    extras_require={
        "smollm2": ["gguf>=0.19,<1", "accelerate>=1.15,<2"],
        "report": ["matplotlib>=3.11,<4"],
        "dev": ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff>=0.17,<0.18"],
        # what tests and benchmarks compare with
        "oracles": [
            "peft>=0.21,<1",
            "trl>=1.16,<2",
            "scikit-learn>=1.9,<2",
            "nltk>=3.10,<4",
            "rouge-score>=0.1.2,<1",
        ],
    },
)
