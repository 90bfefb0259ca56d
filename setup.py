from setuptools import find_packages, setup

setup(
    name="desc",
    version="0.1.0",
    description=(
        "Decoupled preference optimisation for emotional-support conversation, in plain PyTorch"
    ),
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["desc", "desc.*"]),
    package_data={"desc": ["data/*", "data/*/*"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0,<6",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tqdm>=4.60",
    ],
    extras_require={
        "smollm2": ["gguf>=0.10"],
        "report": ["matplotlib>=3.7"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "peft>=0.17",
            "trl>=0.24",
            "scikit-learn>=1.4",
            "nltk>=3.9",
            "rouge-score>=0.1.2",
        ],
    },
)
