"""Token classifiers as they lie on disk, with a tokenizer that cuts text elsewhere than the policy's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEMPLATE = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}|{% endfor %}"


def merging_tokenizer(chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that puts `12`, `ab` and two line breaks each into one token, with <bos> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<bos>", *alphabet, "12", "ab", "ĊĊ"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("a", "b"), ("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")
    fast.chat_template = chat_template
    return fast


def save_token_classifier(
    folder: Path, *, seed: int = 0, num_labels: int = 1, tokenizer: Any = None, pad: int | None = 0, **options: Any
) -> str:
    """A tiny Llama that classifies tokens, with `merging_tokenizer` unless another is given."""
    tokenizer = tokenizer or merging_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=pad,
        num_labels=num_labels,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.LlamaForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logits_of(folder: str | Path, ids: list[int]) -> list[list[float]]:
    """(tokens, labels): one row through the model as plain transformers loads it."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()
