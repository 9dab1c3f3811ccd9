"""The model's tokenizer, or one of our own for models that never had any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llem_ray.backends.cache_file import write_atomically
from llem_ray.backends.model_config import load_error
from llem_ray.backends.model_source import ModelSource
from llem_ray.core.backend import BackendConfig, ChatMessage
from llem_ray.core.errors import ConfigError, LoadError

UNKNOWN, BEGIN, END = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def read_tokenizer(location: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer in a folder or hub repository, padding on the left.

    Raises:
        OSError: It is not there.
        ValueError: It cannot be built.
    """
    return AutoTokenizer.from_pretrained(
        location, revision=revision or "main", trust_remote_code=trust_remote_code, padding_side="left"
    )


def train_tokenizer(vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the shipped prompts; the same for the same size and tokenizers version.

    Args:
        vocab_size: Ids the model knows; the tokenizer uses at most as many.
        cache_dir: Where it is kept for the next time; trained anew when that cannot be written.

    Raises:
        LoadError: The model knows fewer ids than there are bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise LoadError(
            f"no tokenizer can be trained for a vocabulary of {vocab_size}: a byte-level one needs {SMALLEST_VOCABULARY}",
            "set `model.tokenizer`, or a larger vocab_size",
        )
    text = (files("llem_ray.workloads") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    corpus = [json.loads(line)["prompt"] for line in text.splitlines()]
    key = hashlib.sha256(f"{tokenizers.__version__}\n{vocab_size}\n{text}".encode()).hexdigest()[:16]
    path = cache_dir / "tokenizers" / f"{key}.json"
    if path.exists():
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    else:
        tokenizer = _train(corpus, vocab_size)
        with suppress(OSError):
            write_atomically(path, tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, padding_side="left"
    )


def find_tokenizer(config: BackendConfig, source: ModelSource, model_config: Any) -> tuple[Any, str]:
    """The model's tokenizer and where it came from; one trained locally where the model has none.

    Raises:
        LoadError: It cannot be read.
    """
    if source.tokenizer is not None:
        revision = config.model.revision if source.tokenizer == source.location else None
        try:
            tokenizer = read_tokenizer(source.tokenizer, revision=revision, trust_remote_code=config.model.trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError) as error:
            if not source.tokenizer_optional:
                raise load_error(f"tokenizer {source.tokenizer!r}", error) from error
        else:
            return tokenizer, source.tokenizer
    vocab_size = int(model_config.get_text_config().vocab_size)
    return train_tokenizer(vocab_size, Path(config.cache_dir)), "trained locally"


def encode_chats(tokenizer: Any, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
    """Token ids of each chat by the tokenizer's own template, up to where the assistant's answer begins.

    Raises:
        ConfigError: There is no template, or it refuses these messages.
    """
    field, allowed = "workload.prompts.chat_template", "false, or a model whose tokenizer has a chat template"
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template", field=field, found="true", allowed=allowed)
    try:
        return [
            list(
                tokenizer.apply_chat_template(
                    [message._asdict() for message in chat], tokenize=True, add_generation_prompt=True, return_dict=False
                )
            )
            for chat in chats
        ]
    except (TemplateError, ValueError) as error:
        message = f"the model's chat template refuses the messages: {error}"
        raise ConfigError(message, field=field, found="true", allowed=allowed) from error


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of begin, end, padding and every added token that is marked special, ascending."""
    added = (index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


def _train(corpus: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    begin_id = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin_id)]
    )
    return tokenizer
