"""Chats of several turns and of exact lengths, rendered by templates of the common kinds with a real tokenizer."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llem_ray.backends.tokenizer import encode_chats, special_token_ids, train_tokenizer
from llem_ray.core.backend import ChatMessage, Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.workload_spec import LengthSpec, LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.workloads.chats import ChatTemplate
from llem_ray.workloads.online import build_online
from llem_ray.workloads.prompt_files import Exchange, PromptSet
from llem_ray.workloads.prompts import build_requests, load_prompts

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML
FORGETFUL = "{{ bos_token }}{{ messages[-1].content }}<|im_end|>"
MUTE = "{{ bos_token }}hello"
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "system": SYSTEM}
LATER = {
    "chatml": "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "brackets": "</s>[INST] {} [/INST]",
    "system": "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}
VOCAB, CONTEXT = 700, 4096


@functools.cache
def tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        made = train_tokenizer(600, Path(folder))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def renderer(template: str) -> Any:
    def render(chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        tokenizer().chat_template = template
        return encode_chats(tokenizer(), chats)

    return render


def built(template: str, **fields: Any) -> tuple[Request, ...]:
    workload = WorkloadSpec(**fields)
    return build_requests(
        workload,
        lambda texts: [list(tokenizer()(text).input_ids) for text in texts],
        VOCAB,
        CONTEXT,
        load_prompts(workload.prompts),
        special_token_ids(tokenizer()),
        encode_chats=renderer(template),
    )


def shown(ids: Sequence[int]) -> str:
    return str(tokenizer().decode(ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_later_turns_add_what_the_template_puts_after_an_answer(name: str) -> None:
    prompts = PromptSpec(chat_template=True, limit=6)
    requests = built(TEMPLATES[name], prompts=prompts, output_tokens=5, turns=3, batch_size=2)
    texts = load_prompts(prompts).texts
    rendered = [tokenizer().decode(ids) for ids in renderer(TEMPLATES[name])([[ChatMessage("user", text)] for text in texts])]
    assert all(shown(request.prompt_token_ids) in rendered for request in requests[:2])
    for earlier, later in itertools.pairwise([requests[0:2], requests[2:4], requests[4:6]]):
        for before, after in zip(earlier, later, strict=True):
            known = len(before.prompt_token_ids)
            assert after.prompt_token_ids[:known] == before.prompt_token_ids
            assert shown(after.prompt_token_ids[known + 5 :]).strip() in [LATER[name].format(text).strip() for text in texts]


@pytest.mark.parametrize("name", ["chatml", "system"])
def test_a_recorded_conversation_is_the_chat_as_the_template_renders_it(name: str) -> None:
    said = ("How long does it need?", "Three minutes.", "And the other?", "Five of them.", "Thanks.", "Not at all.")
    talk = tuple(Exchange(*pair) for pair in zip(said[::2], said[1::2], strict=True))
    workload = WorkloadSpec(
        prompts=PromptSpec(source="file", path="s", format="sharegpt", chat_template=True),
        turns="recorded",
        output_tokens=LengthSpec(distribution="answer"),
    )
    requests = build_requests(
        workload,
        lambda texts: [list(tokenizer()(text).input_ids) for text in texts],
        VOCAB,
        CONTEXT,
        PromptSet(texts=said[:1], answers=said[1:2], conversations=(talk,)),
        special_token_ids(tokenizer()),
        encode_chats=renderer(TEMPLATES[name]),
    )
    for turn, request in enumerate(requests):
        roles = itertools.cycle(("user", "assistant"))
        chat = [ChatMessage(role, text) for role, text in zip(roles, said[: 2 * turn + 1], strict=False)]  # type: ignore[arg-type]
        (whole,) = renderer(TEMPLATES[name])([chat])
        assert shown(request.prompt_token_ids) == shown(whole)


@pytest.mark.parametrize("source", ["synthetic", "builtin"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_length_is_that_of_the_whole_message(name: str, source: Any) -> None:
    lengths = LengthSpec(distribution="uniform", min=40, max=120)
    asked: dict[str, Any] = {"input_tokens": lengths, "output_tokens": 4, "turns": 2, "batch_size": 8}
    chats = built(TEMPLATES[name], prompts=PromptSpec(source=source, chat_template=True), **asked)
    plain = built(TEMPLATES[name], prompts=PromptSpec(source=source), **asked)
    assert [len(chat.prompt_token_ids) for chat in chats] == [len(text.prompt_token_ids) for text in plain]
    frames = [ChatTemplate(renderer(TEMPLATES[name])).frame(turn) for turn in (0, 1)]
    for index, chat in enumerate(chats):
        frame, body = frames[index // 8], chat.prompt_token_ids
        if index >= 8:
            body = body[len(chats[index - 8].prompt_token_ids) + 4 :]
        assert body[: len(frame.before)] == frame.before
        assert body[len(body) - len(frame.after) :] == frame.after
        inner = body[len(frame.before) : len(body) - len(frame.after)]
        assert not set(inner) & set(special_token_ids(tokenizer()))


@pytest.mark.parametrize("turns", [1, 2])
def test_a_length_below_the_template_names_the_least(turns: int) -> None:
    spec: dict[str, Any] = {"prompts": PromptSpec(source="synthetic", chat_template=True), "turns": turns}
    frames = [ChatTemplate(renderer(BRACKETS)).frame(turn).tokens for turn in range(turns)]
    least = max(frames) + 1
    built(BRACKETS, input_tokens=least, **spec)
    with pytest.raises(ConfigError, match=f"chat template alone has {least - 1} tokens around a message") as caught:
        built(BRACKETS, input_tokens=least - 1, **spec)
    error = caught.value
    assert (error.field, error.found) == ("workload.input_tokens", str(least - 1))
    assert error.allowed == f"at least {least} tokens"


@pytest.mark.parametrize(
    ("template", "fields", "says"),
    [
        (FORGETFUL, {"turns": 2}, "shows nothing of the answer"),
        (MUTE, {"input_tokens": 20}, "shows nothing of the message"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(template: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        built(template, prompts=PromptSpec(chat_template=True), **fields)
    assert caught.value.field == "workload.prompts.chat_template"


def test_a_chat_under_an_online_load() -> None:
    workload = WorkloadSpec(
        prompts=PromptSpec(chat_template=True), output_tokens=3, requests=4, turns=2, load=LoadSpec(pattern="saturated")
    )
    encode = [list(tokenizer()(text).input_ids) for text in load_prompts(workload.prompts).texts]
    work = build_online(workload, lambda _: encode, VOCAB, CONTEXT, load_prompts(workload.prompts), encode_chats=renderer(CHATML))
    first, second = work.requests[:2]
    assert second.follows == first.request_id
    assert second.new_prompt_tokens is not None
    assert shown(second.prompt_token_ids[-second.new_prompt_tokens :]).startswith("<|im_end|>\n<|im_start|>user\n")
