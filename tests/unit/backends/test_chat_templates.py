"""Chats rendered by a tokenizer's own template, the way both engines do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llem_ray.backends.tokenizer import encode_chats, train_tokenizer
from llem_ray.core.backend import ChatMessage
from llem_ray.core.errors import ConfigError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [ChatMessage("user", "Why?"), ChatMessage("assistant", "Because."), ChatMessage("user", "Oh.")]


def test_the_begin_token_comes_once_and_the_answer_is_asked_for(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(600, tmp_path)
    tokenizer.chat_template = TEMPLATE
    (ids,) = encode_chats(tokenizer, [CHAT])
    assert tokenizer.decode(ids) == "<s>[user] Why?\n[assistant] Because.\n[user] Oh.\n[assistant]"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize(("template", "says"), [(None, "has no chat template"), (TEMPLATE, "refuses the messages: no system")])
def test_no_template_and_one_that_refuses(tmp_path: Path, template: str | None, says: str) -> None:
    tokenizer = train_tokenizer(600, tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=says) as caught:
        encode_chats(tokenizer, [[ChatMessage("system", "Be brief."), *CHAT]])
    assert (caught.value.field, caught.value.found) == ("workload.prompts.chat_template", "true")
