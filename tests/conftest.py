"""Fixtures that several files share, and the marker `slow`: skipped unless --slow is given."""

import os
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from desc.esconv import load_dialogues
from desc.modeling import load


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes: on SmolLM2's real weights, and those that compile")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes (SmolLM2's real weights, compilation); runs only with --slow")
    torch.set_num_threads(1)  # the models are tiny: threads would only get in each other's way


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(autouse=True)
def seed():
    """A test draws the same numbers alone, in company and every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy():
    """(model, tokenizer), shared by all tests: a test that adds adapters does so on a copy.deepcopy of the model."""
    return load("toy", torch.float32)


@pytest.fixture(scope="session")
def smollm2():
    return load("smollm2", torch.float32)


@pytest.fixture(scope="session")
def sample():
    return load_dialogues(files("desc") / "data" / "sample.json")


@pytest.fixture(scope="session")
def esconv_path():
    """ESConv.json with the DecoupledESC split.json beside it; never part of the repository."""
    path = Path(os.environ.get("DESC_ESCONV", ""))
    if not path.is_file():
        pytest.skip("set DESC_ESCONV to an ESConv.json that has the DecoupledESC split.json beside it")
    return path
