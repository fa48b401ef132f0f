"""Fixtures for all tests: a tiny causal model, its tokenizer, and problems of GSM8K."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.models import CHAT_TEMPLATE, byte_tokenizer, tiny_llama  # noqa: E402
from tests.helpers.paths import DATA  # noqa: E402


def pytest_runtest_setup() -> None:
    """Take what modules that were imported hold out of garbage collection: Trainer collects after each training, which
    would look through all of it, and take four times as long as training a tiny model."""
    if len(gc.get_objects()) > 50_000:
        gc.collect()
        gc.freeze()


@pytest.fixture
def tokenizer():
    """A fresh byte-level tokenizer without a chat template."""
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer():
    """The same with a chat template: `<|role|>text` lines."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def tiny_model():
    """A fresh Llama of two layers, always with the same weights."""
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """A folder with that model and its tokenizer (with a chat template), as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny_llama().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The folder of 50 problems of GSM8K: train.jsonl, test.jsonl, example_model_solutions.jsonl."""
    return DATA / "gsm8k"
