"""Reward models as they lie on disk: tiny ones of several architectures, with tokenizers that cut text in different places."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_rlhf import load_plugin
from hf_rlhf.batch import Rollouts
from hf_rlhf.testing import rollouts

CPU = torch.device("cpu")
PROMPT = "say: "
TEXTS = ["12ab1", "", "A b", "12 ab ab12ab! ab", "x y z"]

TEMPLATE = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}|{% endfor %}"
ENDING = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
"""A chat template that ends every message with the end-of-sequence token."""
LETTERS = [chr(i) for i in range(33, 127)]

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SMALL, "initializer_range": 0.3}),
    "qwen2": ("Qwen2Config", {**SMALL, "num_key_value_heads": 2, "initializer_range": 0.3}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}),
    "bert": ("BertConfig", {**SMALL, "max_position_embeddings": 96, "initializer_range": 0.3}),
    "deberta": (
        "DebertaV2Config",
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "initializer_range": 0.3},
    ),
    "modernbert": (
        "ModernBertConfig",
        {**SMALL, "num_hidden_layers": 2, "initializer_range": 0.3, "initializer_cutoff_factor": 2.0},
    ),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}),
}
"""Architecture -> its configuration class and what makes it tiny."""


# Tokenizers


def merging_tokenizer(chat_template: str | None = None, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that puts `12`, `ab` and two line breaks each into one token, with <bos> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<bos>", *alphabet, "12", "ab", "ĊĊ", "<eos>", "<step>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("a", "b"), ("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.add_special_tokens(["<step>"])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **options}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat_template
    return fast


def spaced_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Unigram with `▁` for spaces and one in front of the text, as SentencePiece has it, and </s> after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, "▁12", "▁a", "ab", "12", "▁+", "▁-", "▁ки"]
    scores = [(piece, -float(10 - min(len(piece), 5))) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """WordPiece in lower case with [CLS], [SEP] and token types, as BERT has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "12", "ab", "say", *LETTERS, *("##" + letter for letter in LETTERS)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {"merging": merging_tokenizer, "spaced": spaced_tokenizer, "words": word_tokenizer}


# Models


def configuration(arch: str, **options: Any) -> Any:
    """A tiny configuration; without a padding token unless `pad_token_id` is given."""
    name, sizes = CONFIGS[arch]
    own = {
        "pad_token_id": None if arch in ("llama", "qwen2", "gpt2") else 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if arch == "modernbert":
        own |= {"cls_token_id": None, "sep_token_id": None}
    return getattr(transformers, name)(vocab_size=300, **{**sizes, **own, **options})


def save_model(
    folder: Path, auto: str, arch: str = "llama", *, tokenizer: Any = None, seed: int = 0, **options: Any
) -> str:
    """A model of a transformers Auto class (`AutoModelFor...`) from a configuration, with its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(configuration(arch, **options))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at 0, and would hide a head that forgets its own
                parameter.data.normal_()
        model.save_pretrained(folder)
    (tokenizer or merging_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_sequence_classifier(folder: Path, arch: str = "llama", *, num_labels: int = 1, **options: Any) -> str:
    return save_model(folder, "AutoModelForSequenceClassification", arch, num_labels=num_labels, **options)


def save_token_classifier(
    folder: Path, *, arch: str = "llama", num_labels: int = 1, pad: int | None = 0, **options: Any
) -> str:
    """A tiny model that classifies tokens, with `merging_tokenizer` unless another is given."""
    return save_model(
        folder, "AutoModelForTokenClassification", arch, num_labels=num_labels, pad_token_id=pad, **options
    )


def direct(kind: str, folder: str | Path) -> Any:
    """The model as plain transformers loads it."""
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()


def logits_of(folder: str | Path, ids: list[int], kind: str = "TokenClassification") -> list[list[float]]:
    """(tokens, labels): one row through the model as plain transformers loads it."""
    with torch.no_grad():
        return direct(kind, folder)(input_ids=torch.tensor([ids])).logits[0].tolist()


def save_three(folder: Path, **options: Any) -> str:
    """A sequence classifier with three labels that have names."""
    return save_sequence_classifier(
        folder, num_labels=3, id2label={0: "helpful", 1: "honest", 2: "harmless"}, label2id={"helpful": 0}, **options
    )


# Outcomes


def loaded(folder: str | Path, name: str = "reward_model", **settings: Any) -> Any:
    """A reward source with its model on the CPU."""
    source = load_plugin("rewards", name, model=str(folder), **settings)
    source.load_model(CPU)
    return source


def given(texts: list[str], prompts: list[Any] | None = None) -> Rollouts:
    """Completions of any characters; what their tokens are to the policy does not matter here."""
    made = rollouts([""] * len(texts), prompts=prompts or [PROMPT] * len(texts))
    made.completions = list(texts)
    return made


def one_by_one(folder: str | Path, texts: list[Any], **options: Any) -> list[list[float]]:
    """(rows, labels): each text (or pair of texts) alone through tokenizer and model as plain transformers loads them."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), direct("SequenceClassification", folder)
    known, found = inspect.signature(model.forward).parameters, []
    for text in texts:
        row = tokenizer(*(text if isinstance(text, tuple) else (text,)), return_tensors="pt", **options)
        with torch.no_grad():
            found.append(model(**{name: x for name, x in row.items() if name in known}).logits[0].tolist())
    return found


def firsts(rows: list[list[float]]) -> list[float]:
    return [row[0] for row in rows]
