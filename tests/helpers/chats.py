"""Tokenizers with the chat templates of well-known models: TRL's copies of them, and small ones that behave like others."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

LOOP = "{% for m in messages %}"
OWN = {
    "chatml": LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "printing": LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mistral": "{{ bos_token }}" + LOOP + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "without_system": LOOP + "{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "forgetful": LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinking": LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>\n' if enable_thinking | default(true) }}{% endif %}",
}  # fmt: skip


def text_of(template: str) -> str:
    """Return one of OWN, or a template that TRL ships."""
    import trl

    if template in OWN:
        return OWN[template]
    return (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(template: str, *, special: tuple[str, ...] = (), bos: bool = False, **kwargs: Any) -> Any:
    """Return a byte-level tokenizer with a chat template and `special` tokens; `bos`: it puts <s> before texts.

    `kwargs` are the recipe's `model.chat_template_kwargs`.
    """
    from tokenizers import AddedToken, processors

    from tests.helpers.models import byte_tokenizer

    end = "<｜end▁of▁sentence｜>" if template.startswith("deepseek") else "<|im_end|>"
    made = byte_tokenizer(bos_token="<s>", eos_token=end)
    made.add_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
    made.chat_template = text_of(template)
    made.chat_template_kwargs = kwargs
    return made


@cache
def sentencepiece_tokenizer() -> Any:
    """Return a tokenizer whose decoder strips a text's first space, as those of Llama 2 and Mistral 7B do."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁4", "▁apples", "▁A", ":"]
    tokens = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokens.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
