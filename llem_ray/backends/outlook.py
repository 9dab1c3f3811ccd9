"""What requests are made with, before weights are loaded. Importing this module imports transformers: backends do so late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llem_ray.backends.model_config import context_tokens, load_error, quieten, read_model_config
from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.tokenizer import encode_chats, find_tokenizer, special_token_ids
from llem_ray.core.backend import BackendConfig, ChatMessage, ModelOutlook


class Outlook:
    """A model's tokenizer and sizes.

    Args:
        config: Of the backend.
        source: Where the model comes from.
        model_config: Its transformers config; None: it is read.
        context: Longest prompt plus output; None: what the config says.

    Raises:
        LoadError: Config or tokenizer cannot be read.
    """

    def __init__(self, config: BackendConfig, source: ModelSource, model_config: Any = None, context: int | None = None) -> None:
        quieten()
        if model_config is None:
            try:
                model_config = read_model_config(source, config.model)
            except Exception as error:  # configs of third parties may raise anything
                raise load_error(f"model {source.location!r}", error) from error
        self._tokenizer, _ = find_tokenizer(config, source, model_config)
        self.told = ModelOutlook(
            context_tokens=context_tokens(model_config) if context is None else context,
            vocab_size=int(model_config.get_text_config().vocab_size),
            special_token_ids=special_token_ids(self._tokenizer),
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, nothing cut."""
        return [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        return encode_chats(self._tokenizer, chats)
