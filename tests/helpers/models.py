"""A tiny causal model and a byte-level tokenizer, made from configurations."""

from __future__ import annotations

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


def tiny_moe(vocab_size=258, kind="Mixtral", dtype=None, **options):
    """A mixture of four experts, two per token, in three layers; `coef` is in its configuration by default."""
    import torch
    import transformers

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "router_aux_loss_coef": 0.001,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    config._experts_implementation = "eager"  # the others have no float64
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return torch.nn.Module.to(model, dtype or torch.float32).eval()


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
