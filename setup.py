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
    # Lower bounds: the tests were run with these (runs/install.sh --oldest), but for those that
    # compare with newer oracles. All tests were run with runs/constraints.txt. Upper bounds: the
    # next major versions.
    install_requires=[
        "torch>=2.9.1,<3",
        "transformers>=5.0.0,<6",
        "safetensors>=0.4.3,<1",
        "sentencepiece>=0.2.0,<1",
        "tqdm>=4.60.0,<5",
    ],
    extras_require={
        "smollm2": ["gguf>=0.10,<1", "accelerate>=1.1,<2"],
        "report": ["matplotlib>=3.7,<4"],
        "dev": ["pytest>=8", "pytest-xdist>=3.7", "ruff>=0.17,<0.18"],
        # what tests and benchmarks compare with
        "oracles": [
            "peft>=0.17",
            "trl>=0.24",
            "scikit-learn>=1.4",
            "nltk>=3.9",
            "rouge-score>=0.1.2",
        ],
    },
)
