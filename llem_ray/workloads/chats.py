"""A model's chat template as token ids: what it puts around a message, in the first turn of a conversation and in later ones.

Answers between the turns are token ids, which no template can render. What a later turn adds is found by rendering the chat
twice with different answers: all that both renderings have in common at their end follows the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from llem_ray.core.backend import ChatMessage
from llem_ray.core.errors import ConfigError

EncodeChats = Callable[[Sequence[Sequence[ChatMessage]]], list[list[int]]]
Ids = tuple[int, ...]

_MARKS: Final = ("a", "b")


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens of the template before and after what a user says."""

    before: Ids
    """In a later turn from the end of the answer on: what closes it, and what opens the message."""
    after: Ids
    """Up to where the assistant's answer begins."""

    @property
    def tokens(self) -> int:
        """Both together."""
        return len(self.before) + len(self.after)


class ChatTemplate:
    """The template of a loaded model.

    Args:
        render: See ``InferenceBackend.encode_chats``.
    """

    def __init__(self, render: EncodeChats) -> None:
        self._render = render
        self.frame = cache(self._frame)
        """Frame of a turn, counted from 0."""

    def messages(self, texts: Sequence[str], turns: Sequence[int]) -> list[Ids]:
        """What each text adds to its conversation, as a user's message in the turn given.

        Raises:
            ConfigError: The template refuses the messages, or shows no difference between two answers.
        """
        asked = list(zip(texts, turns, strict=True))
        rendered = iter(self._render([_chat(turn, text, mark) for text, turn in asked for mark in _MARKS[: 2 if turn else 1]]))
        added: list[Ids] = []
        for turn in turns:
            shown = next(rendered)
            added.append(tuple(shown[len(shown) - _common(shown[::-1], next(rendered)[::-1], "answer") :] if turn else shown))
        return added

    def framed(self, turn: int, tokens: int, content: Callable[[int], Ids]) -> Ids:
        """A message of exactly so many tokens, those of the template included.

        Args:
            turn: In its conversation, from 0.
            tokens: How many.
            content: Makes what the user says, as long as asked for.

        Raises:
            ConfigError: The template alone has as many.
        """
        frame = self.frame(turn)
        if tokens <= frame.tokens:
            where = "" if turn == 0 else " of a later turn"
            raise ConfigError(
                f"the model's chat template alone has {frame.tokens} tokens around a message{where}",
                "raise workload.input_tokens, or set workload.prompts.chat_template: false",
                field="workload.input_tokens",
                found=str(tokens),
                allowed=f"at least {frame.tokens + 1} tokens",
            )
        return frame.before + content(tokens - frame.tokens) + frame.after

    def _frame(self, turn: int) -> Frame:
        one, other = _MARKS
        chats = [_chat(turn, one, one), _chat(turn, other, one), _chat(turn, one, other)]
        shown, said, answered = self._render(chats)
        begin = len(shown) - _common(shown[::-1], answered[::-1], "answer") if turn else 0
        before = _common(shown, said, "message")
        after = _common(shown[::-1], said[::-1], "message")
        if begin > before:
            raise _odd("does not end with the last message")
        return Frame(tuple(shown[begin:before]), tuple(shown[len(shown) - after :]))


def _chat(turn: int, text: str, answer: str) -> list[ChatMessage]:
    """A chat whose user says ``text`` in its turn; the answer before it is the one given, other messages are marks."""
    earlier = [ChatMessage(role, _MARKS[0]) for _ in range(turn) for role in ("user", "assistant")]
    if turn:
        earlier[-1] = ChatMessage("assistant", answer)
    return [*earlier, ChatMessage("user", text)]


def _common(first: Sequence[int], second: Sequence[int], what: str) -> int:
    """Tokens that both begin with."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    raise _odd(f"shows nothing of the {what}")


def _odd(message: str) -> ConfigError:
    return ConfigError(
        f"the model's chat template {message}",
        field="workload.prompts.chat_template",
        found="true",
        allowed="false, or turns: 1 and no input_tokens",
    )
