"""Shared fixtures: a tiny causal model and a byte-level tokenizer, made from configs, and the GSM8K problems."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(**options):
    """A byte-level tokenizer without merges: 256 bytes, <pad> 256, <eos> 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"pad_token": "<pad>", "eos_token": "<eos>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **options)


def tiny_llama(**options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": 257,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


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
def gsm8k():
    """The folder of the GSM8K problems: train.jsonl, test.jsonl, example_model_solutions.jsonl."""
    folder = DATA / "gsm8k"
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"needs the GSM8K problems in {folder}")
    return folder
