"""Fixtures for all tests: small random checkpoint folders of both families, written once.

All tests share the folders: copy one before changing it.
"""

import os
from pathlib import Path

import checkpoints
import pytest
import torch

from lora_engine.pretrained import Captioner, load_captioner

# One thread: these models are so small that sharing the work costs several times the work, the
# more so on a busy machine. Children inherit the environment.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network, not even by mistake


@pytest.fixture(scope="session", autouse=True)
def _features_are_kept_for_these_tests_only(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    checkpoints.write_blip(folder)
    return folder


@pytest.fixture(scope="session")
def vit_gpt2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit_gpt2")
    checkpoints.write_vit_gpt2(folder)
    return folder


@pytest.fixture(scope="session", params=["blip", "vit_gpt2"])
def captioner_folder(request) -> Path:
    """A checkpoint folder of each family in turn."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def captioner(captioner_folder) -> Captioner:
    """A freshly loaded captioner of each family in turn, free to be changed."""
    return load_captioner(captioner_folder)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    torch.manual_seed(0)
