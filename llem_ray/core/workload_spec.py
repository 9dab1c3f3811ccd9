"""What is asked of an engine: prompts, lengths, conversations, and how requests reach it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

from llem_ray.core.spec_fields import ADDED, STRICT, Ge, Gt

LoadPattern = Literal["batch", "saturated", "closed", "constant", "poisson", "gamma", "trace"]
TurnAnswers = Literal["auto", "known", "generated"]

OPEN_LOOPS: Final[frozenset[str]] = frozenset({"constant", "poisson", "gamma", "trace"})
"""Load patterns that send at times of their own, however many requests are in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSpec:
    """Where prompts come from."""

    __pydantic_config__: ClassVar[Any] = STRICT

    source: Literal["builtin", "file", "synthetic", "dataset"] = "builtin"
    """`builtin` is the set shipped with llem-ray; `file` reads JSON Lines or Parquet; `dataset` reads with the Hugging Face
    `datasets` library; `synthetic` draws random token ids."""
    path: str | None = None
    """File of `source: file`, relative to the sweep file: Parquet (`.parquet`), else JSON Lines or a JSON list, of objects or
    strings."""
    column: str = "prompt"
    """Column of the prompt text: a key of each line, or a column of the table."""
    answer_column: str | None = field(default=None, metadata=ADDED)
    """Column of a known answer, for `output_tokens: {distribution: answer}`."""
    format: Literal["column", "sharegpt"] = field(default="column", metadata=ADDED)
    """`sharegpt`: each entry has `conversations`, a list of `{from, value}`. The prompt is the first human turn, the known
    answer the turn that follows it; entries without a human turn are left out. `workload.turns: recorded` takes all turns."""
    dataset: str | None = field(default=None, metadata=ADDED)
    """Data set of `source: dataset`: a hub id, or a local folder or file (JSON Lines, JSON, CSV, Parquet, text), relative to
    the sweep file."""
    config: str | None = field(default=None, metadata=ADDED)
    """Configuration (subset) of the data set."""
    split: str = field(default="train", metadata=ADDED)
    """Split of the data set; `train[:1000]` takes a part of it."""
    revision: str | None = field(default=None, metadata=ADDED)
    """Branch, tag or commit of the data set's repository."""
    limit: Annotated[int, Ge(1)] | None = field(default=None, metadata=ADDED)
    """Prompts that are read, from the start of the source; None reads all."""
    chat_template: bool = field(default=False, metadata=ADDED)
    """Render each prompt as a user's message with the model's own chat template, up to where the answer begins. `input_tokens`
    then counts the template's tokens too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthSpec:
    """How many tokens each request has: numbers drawn from a distribution, by `workload.seed`."""

    __pydantic_config__: ClassVar[Any] = STRICT

    distribution: Literal["fixed", "uniform", "normal", "lognormal", "empirical", "answer"]
    """`fixed`: always `mean`. `uniform`: every whole number from `min` to `max` alike. `normal`, `lognormal`: `mean` and `std`,
    cut off at `min` and `max`. `empirical`: one of `values`, or of the lines of `path`. `answer` (output only): the length of
    the prompt's known answer, limited to `min` and `max`."""
    mean: Annotated[float, Gt(0)] | None = None
    """Mean length in tokens, before it is cut off."""
    std: Annotated[float, Ge(0)] | None = None
    """Standard deviation of the length in tokens (of the length itself, also for `lognormal`), before it is cut off."""
    min: Annotated[int, Ge(1)] | None = None
    """Smallest length; default 1."""
    max: Annotated[int, Ge(1)] | None = None
    """Largest length; default: no limit."""
    values: tuple[Annotated[int, Ge(1)], ...] | None = None
    """Lengths to draw from."""
    weights: tuple[Annotated[float, Ge(0)], ...] | None = None
    """How often each of `values` is drawn, relative to the others; default: all alike."""
    path: str | None = None
    """File of lengths to draw from, relative to the sweep file. Each line a number of tokens, or `tokens,weight`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpec:
    """How long each wait is: numbers drawn from a distribution, by `workload.seed`."""

    __pydantic_config__: ClassVar[Any] = STRICT

    distribution: Literal["fixed", "uniform", "exponential", "normal", "lognormal", "empirical"]
    """`fixed`: always `mean`. `uniform`: from `min` to `max`. `exponential`: `mean`; `normal`, `lognormal`: `mean` and `std`; all
    three cut off at `min` and `max`. `empirical`: one of `values`."""
    mean: Annotated[float, Gt(0)] | None = None
    """Mean, s, before it is cut off."""
    std: Annotated[float, Ge(0)] | None = None
    """Standard deviation of the wait itself, s, before it is cut off."""
    min: Annotated[float, Ge(0)] | None = None
    """Shortest wait, s; default 0."""
    max: Annotated[float, Gt(0)] | None = None
    """Longest wait, s; default: no limit."""
    values: tuple[Annotated[float, Ge(0)], ...] | None = None
    """Waits to draw from, s."""
    weights: tuple[Annotated[float, Ge(0)], ...] | None = None
    """How often each of `values` is drawn, relative to the others; default: all alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSpec:
    """How requests reach the engine."""

    __pydantic_config__: ClassVar[Any] = STRICT

    pattern: LoadPattern = "batch"
    """`batch` runs `batch_size` requests together, one batch after the other. All others send `requests` one by one to an
    engine that serves: `saturated` at once, or so that `concurrency` are in flight; `closed` so that `concurrency` are in flight;
    `constant`, `poisson` and `gamma` at `rate_per_s`, however many are in flight; `trace` at recorded times."""
    rate_per_s: Annotated[float, Gt(0)] | None = None
    """Requests per second (`constant`, `poisson`, `gamma`); with `turns`, conversations that begin per second."""
    burstiness: Annotated[float, Gt(0)] | None = None
    """Shape of the gamma distribution of gaps between arrivals (`gamma`): 1 is Poisson, less is burstier, more is steadier."""
    concurrency: Annotated[int, Ge(1)] | None = None
    """Requests in flight (`closed`, `saturated`); with `turns`, conversations that are open. Without it `saturated` leaves the
    limit to the engine."""
    trace: str | None = None
    """CSV or JSON Lines file of arrivals (`trace`), relative to the sweep file: `timestamp_s` with `input_tokens` and
    `output_tokens`, or the shape of Mooncake's or Azure's traces. Lengths in it go before those of the workload."""
    trace_speed: Annotated[float, Gt(0)] = 1.0
    """The trace is replayed this many times as fast."""
    trace_prefixes: bool = field(default=True, metadata=ADDED)
    """Prompts share the blocks of 512 tokens that `hash_ids` of a Mooncake trace name; false makes each prompt its own."""
    trace_max_input_tokens: Annotated[int, Ge(1)] | None = field(default=None, metadata=ADDED)
    """Longest prompt of the replay: where the trace has longer ones, all its prompts are shortened by one factor, and the
    blocks they share with them."""

    @property
    def online(self) -> bool:
        """Requests are sent one by one."""
        return self.pattern != "batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadSpec:
    """What is asked of the engine in one window."""

    __pydantic_config__: ClassVar[Any] = STRICT

    prompts: PromptSpec = PromptSpec()
    """Where prompts come from."""
    input_tokens: Annotated[int, Ge(1)] | LengthSpec | None = None
    """Prompt length in tokens, exact or drawn from a distribution: longer prompts are cut, shorter ones continued with the next.
    None keeps natural lengths."""
    output_tokens: Annotated[int, Ge(1)] | LengthSpec = 32
    """Tokens to generate for each request, exact or drawn from a distribution."""
    shared_prefix_tokens: Annotated[int, Ge(0)] = field(default=0, metadata=ADDED)
    """Tokens that requests of one group have in common, before the prompt and on top of `input_tokens`."""
    prefix_groups: Annotated[int, Ge(1)] = field(default=1, metadata=ADDED)
    """Groups of requests, each with a prefix of its own; requests are dealt to them in turn."""
    turns: Annotated[int, Ge(1)] | LengthSpec | Literal["recorded"] = field(default=1, metadata=ADDED)
    """Turns of a conversation, each a request: its prompt is all that came before, answers included, and `input_tokens` new
    ones. A number, drawn from a distribution, or those of the conversations of a file (`recorded`, with `prompts.format:
    sharegpt`). Under an online load a turn is due when the one before is answered."""
    conversations: Annotated[int, Ge(1)] | None = field(default=None, metadata=ADDED)
    """Conversations of one pass, in place of `requests`; default where `turns` vary: `batch_size` of them."""
    max_conversation_tokens: Annotated[int, Ge(1)] | None = field(default=None, metadata=ADDED)
    """Recorded conversations end before the first turn whose prompt and answer are longer than this together; one whose first
    turn is longer is left out."""
    turn_answers: TurnAnswers = field(default="auto", metadata=ADDED)
    """Answers in later prompts. `known`: those of recorded conversations, else random token ids, as many as the turn before
    generates; the same for every engine. `generated`: what the engine did answer. `auto` is `known` in batches and `generated`
    under an online load."""
    think_time_s: Annotated[float, Ge(0)] | TimeSpec = field(default=0.0, metadata=ADDED)
    """How long after an answer the next turn of its conversation is due, s, or its distribution; online loads."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Requests that run together."""
    requests: Annotated[int, Ge(1)] | None = None
    """Distinct requests of one pass, each turn one; default: one batch of each turn. Where `turns` vary, `conversations` says how
    many there are. The pass is repeated until
    `measure.min_window_s` is reached. Under an online load they are sent once; a trace's default is all of its arrivals."""
    ignore_eos: bool = True
    """Generate exactly `output_tokens`, whatever the model says: rows stay comparable."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of lengths, of the choice and order of prompts, and of arrival times."""
    load: LoadSpec = field(default=LoadSpec(), metadata=ADDED)
    """How requests reach the engine."""

    @property
    def generated_answers(self) -> bool:
        """Later prompts hold what the engine did answer."""
        return self.turn_answers == "generated" or (self.turn_answers == "auto" and self.load.online)

    @property
    def recorded(self) -> bool:
        """Its conversations are those of a file."""
        return self.turns == "recorded"

    @property
    def least_turns(self) -> int:
        """Turns that each conversation has at least."""
        if isinstance(self.turns, int):
            return self.turns
        return 1 if self.turns == "recorded" else self.turns.min or 1

    @property
    def whole_conversations(self) -> int | None:
        """Conversations of one pass; None where no number is given. A request without turns is one."""
        if self.conversations is not None or self.requests is None:
            return self.conversations
        return self.requests // self.turns if isinstance(self.turns, int) else None
