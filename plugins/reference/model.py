"""Another model as the reference: a teacher (on-policy distillation, arXiv:2306.13649), or an anchor from elsewhere.

Its tokens must be the policy's. Ids are compared by the tokenizers; rows of a vocabulary that stand for no token, with which
models of one family differ in size, are left out of both distributions, which are normalized over the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import HubModel, Reference

from .._tokenizers import common_tokens, tokenizer_of

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_rlhf.axes import Algorithm

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class OtherModel(Reference):
    """Log-probs of another model that shares the policy's tokens."""

    name = "model"

    path: HubModel | None = None
    """Folder or name on the Hub of a causal language model, to be named before a run. One with another tokenizer than the
    policy's is rejected."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    adapter: HubModel | None = None
    """Folder or Hub name of a LoRA adapter, which is merged into the model."""
    dtype: Literal["policy", "auto", "float32", "bfloat16", "float16", "float64"] = "policy"
    """Number format of its weights: the policy's by default; auto: as it is saved."""
    device: str | None = None
    """Device on which it stays, such as cuda:1 or cpu; the policy's by default."""
    offload: bool = False
    """Keep it in main memory except for the forwards that read it. The trained parameters are bit-identical."""

    def __post_init__(self) -> None:
        self._known: int | None = None

    @property
    def known_tokens(self) -> int | None:
        return self._known

    def in_words(self) -> str:
        return "a model not named yet" if self.path is None else f"the model {self.path}"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.device is not None and self.offload:
            yield f"offload moves it to the policy's device, and device={self.device} keeps it elsewhere. Set offload=false"

    def token_problems(self, tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
        if self.path is None:
            yield (
                "the other model must be named before a run, got no path. Set path=FOLDER or path=NAME on the Hub; for the "
                "quickstart's task, `hf-rlhf train quickstart --output-dir teacher` makes the folder teacher"
            )
            return
        theirs = tokenizer_of(_path(self.path), self.revision)
        if theirs is None:
            logger.warning("reference.path=%r has no tokenizer, so its tokens are taken for the policy's", self.path)
            return
        self._known, difference = common_tokens(tokenizer, theirs)
        if difference is not None:
            yield (
                f"the tokenizer of {self.path} must be the policy's, but {difference}. Use a model of the policy's family, or "
                "see docs/references.md for distillation across tokenizers"
            )

    def build(self, policy: PreTrainedModel) -> Module:
        from transformers import AutoModelForCausalLM

        assert self.path is not None, "the tokens are checked first"
        options: Any = {"dtype": policy.dtype if self.dtype == "policy" else self.dtype, "revision": self.revision}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(_path(self.path), **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"reference.path={self.path!r} is not a causal language model ({error})") from error
        if self.adapter is not None:
            model = _merged(model, self.adapter)
        return model.eval().requires_grad_(False)


def _path(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _merged(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("reference.adapter requires peft: pip install 'hf_rlhf[peft]'") from error
    try:
        adapted: Any = PeftModel.from_pretrained(model, _path(adapter))
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"the adapter in {adapter} does not fit the reference ({error})") from error
    return adapted.merge_and_unload()


@hookimpl
def reference() -> list[type[Reference]]:
    return [OtherModel]
