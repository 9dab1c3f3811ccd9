"""The seam between llem-ray and an inference engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from llem_ray.core.flops import FlopModel
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

FinishReason = Literal["length", "stop", "abort"]
StepKind = Literal["prefill", "decode", "mixed"]
WorkerLayout = Literal["host", "rank", "ray"]
"""How many processes serve a gang: one on each of its hosts, or one for each rank (GPU). ``ray``: one for each rank, which only
keeps its place; the engine starts workers of its own by Ray there, see ``Reservation``."""


class ChatMessage(NamedTuple):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt as token ids: every engine gets the very same ids."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = True
    follows: str | None = None
    """Id of the turn before in its conversation: this one is due when that one has been answered. None: it begins one."""
    think_ns: int = 0
    """How long after that answer it is due."""
    new_prompt_tokens: int | None = None
    """Set: only so many last tokens of the prompt are sent, after the prompt and the real answer of the turn before; the others
    stand for these two and are no fewer. None: the prompt is sent as it is."""
    conversation: int | None = None
    """Number of its conversation in the pass, where there are several turns."""
    turn: int | None = None
    """Number of the turn in its conversation, from 0."""
    shared_prompt_tokens: int = 0
    """Leading prompt tokens that an earlier request of the pass has too, by construction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSchedule:
    """How the requests of a run reach the engine one by one, made before the run starts.

    It counts conversations, by their first requests; a request that belongs to none is one. What follows in a conversation is
    due when the turn before is answered.
    """

    send_at_ns: tuple[int, ...] | None = None
    """Open loop: when each conversation is due, ns after the start of the run, ascending. None: as soon as it may begin."""
    max_in_flight: int | None = None
    """Closed loop: conversations begun and not yet ended, at most. None: any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent:
    """One forward step of the engine, on its node's monotonic clock."""

    begin_ns: int
    end_ns: int
    kind: StepKind
    prefill_tokens: int
    """Real prompt tokens computed in this step."""
    decode_tokens: int
    """Output tokens this step produced (a prefill step yields the first of each request)."""
    computed_tokens: int
    """Token positions the device worked on, padding and finished rows included."""
    flops: float | None = None
    read_bytes: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """What became of one request. Times are ns of the node's monotonic clock."""

    request_id: str
    prompt_tokens: int
    """Counted from ids, padding not included."""
    padded_tokens: int
    """Length the prompt was padded to."""
    output_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    scheduled_ns: int
    """When the load schedule wanted it sent."""
    queued_ns: int
    """When it entered the load generator's queue."""
    sent_ns: int
    """Just before it was handed to the engine."""
    token_times_ns: tuple[int, ...]
    """When each output token was delivered, ascending, as long as ``output_token_ids``; tokens of one chunk share its time."""
    cached_tokens: int | None = None
    """Prompt tokens that a prefix cache saved; None where the engine does not tell."""
    draft_tokens: int | None = None
    """Tokens that speculation proposed for this request; None without speculation, or where the engine does not tell."""
    accepted_tokens: int | None = None
    """Those of them that became output."""
    requested_tokens: int | None = None
    """Output tokens that were asked for; filled in where the request was made, not by the engine, as the fields below are."""
    conversation: int | None = None
    """Number of its conversation in its pass; None where there are no turns."""
    turn: int | None = None
    """Number of the turn in its conversation, from 0."""
    last_turn: bool = True
    """Its conversation ends with it."""
    shared_prompt_tokens: int | None = None
    """Leading prompt tokens that an earlier request of the pass had, or got as its answer, by construction."""

    @property
    def output_chunks(self) -> int:
        """Deliveries: output tokens that share a time arrived together."""
        return len(set(self.token_times_ns))

    @property
    def output_tokens(self) -> int:
        """Tokens generated, counted from ids."""
        return len(self.output_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutlook:
    """What requests are made with, as far as it is known before weights are loaded."""

    context_tokens: int
    """Longest prompt plus output; a load may still find less."""
    vocab_size: int
    special_token_ids: tuple[int, ...] = ()
    """Ids that random prompts leave out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What loading cost and what was loaded. Its times follow each other: none is part of another."""

    import_s: float
    construct_s: float
    compile_s: float | None
    """None where the engine does not tell it apart."""
    warm_s: float | None
    """The engine's own warm-up; None where it does not tell it apart."""
    context_tokens: int
    """Longest prompt plus output the model takes."""
    vocab_size: int
    parameters: int | None
    weight_bytes: int | None
    dtype: str
    device: str
    """``cpu`` or ``cuda``."""
    model_commit: str | None
    """Commit of the hub snapshot, or of the git folder the model lies in."""
    random_weights: bool
    special_token_ids: tuple[int, ...] = ()
    """Ids that random prompts leave out (begin, end, padding); empty where the engine does not tell."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further facts worth a column: ``engine`` (name and version), attention implementation, tokenizer origin."""
    process_start_s: float | None = None
    """Starting the engine's own process; None where it has none."""
    flop_model: FlopModel | None = None
    """What a token costs, for engines that don't count FLOP step by step; None where the architecture is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One worker of a gang, as it sees itself."""

    rank: int
    host: str
    """Stable host id, the same string that the sampler of that host reports as its node."""
    pid: int
    gpu_uuid: str | None
    """None on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """A gang's GPUs as Ray holds them, for an engine of the layout ``ray``: one bundle of one GPU for each rank."""

    ray_version: str
    """Of the cluster, as is the next."""
    python_version: str
    address: str = ""
    """Of the cluster's head, ``host:port``; empty before there is a gang, as is all that follows."""
    group: str = ""
    """Id of the placement group, hexadecimal."""
    gpu_share: float = 0.0
    """How much of its bundle's GPU Ray may still give to each worker."""
    gpu_ids: tuple[str, ...] = ()
    """By rank, as Ray numbers them on each host; the bundle of rank i is number i."""
    gpu_uuids: tuple[str, ...] = ()
    """The same as UUIDs; empty where NVML does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where the processes of one gang meet, and which of them this one is. Rank 0 leads."""

    rank: int
    """Number of this process, from 0."""
    world_size: int
    """Processes of the gang."""
    local_rank: int
    """Number of this process among those on its host, from 0."""
    hosts: tuple[str, ...]
    """Stable host id of every process, by rank."""
    master_addr: str
    """IP address of rank 0, as the others reach it."""
    master_port: int
    """A port that was free there a moment ago; engines may use some of those that follow, too."""
    node_addr: str
    """IP address of this process's host, on the network that the others reach it by."""
    reservation: Reservation | None = None
    """For engines of the layout ``ray`` only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendConfig:
    """All an engine needs to load: handed to the plug-in's factory."""

    model: ModelSpec
    engine: EngineSpec
    device: Literal["cpu", "cuda"]
    """Resolved by the gang: never ``auto``."""
    host: str
    base_dir: str
    """Folder that relative paths start from."""
    cache_dir: str
    """Writable folder for what we build ourselves: locally trained tokenizers, random checkpoints."""
    online: bool = False
    """Requests will come one by one, by schedules: an engine with a serving mode of its own loads that."""
    rendezvous: Rendezvous | None = None
    """None where one process serves the whole gang."""


class InferenceBackend(Protocol):
    """A loaded model that answers requests. The plug-in's factory is ``(BackendConfig) -> InferenceBackend``.

    A gang on several hosts, or of an engine whose factory has the attribute ``worker_layout = "rank"``, is served by several
    processes. Each has a backend of its own, whose ``load`` meets the others at ``BackendConfig.rendezvous``. Rank 0 leads: it
    alone is asked to ``encode``, ``run`` and ``reset``. The others are ``FollowerBackend``: they are left in ``follow``.
    ``worker_layout`` may be a function of the ``EngineSpec``, too.

    The constructor is cheap and touches no device. Calls come from one thread, in the order check, outlook, load, (encode |
    run | reset)*, close. ``close`` may be called at any point and more than once.
    """

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            ConfigError: An argument is unknown or has a wrong value, or the model is not there.
            PluginError: The engine cannot run here.
        """
        ...

    def outlook(self) -> ModelOutlook | None:
        """What requests are made with; ``encode`` and ``encode_chats`` work from then on. None where only a load can tell.

        Called after ``check`` and before ``load``, of a lone process or of rank 0, and only where requests may turn out to be
        too long for the model. An engine without this method refuses them once it is loaded.

        Raises:
            LoadError: The model's config or tokenizer cannot be read.
        """
        ...

    def load(self) -> LoadReport:
        """Load model and tokenizer onto the device.

        Raises:
            LoadError: It could not be loaded.
            DeviceMemoryError: The device is too small.
        """
        ...

    def identity(self) -> tuple[Rank, ...]:
        """The workers that this process serves, by rank: all of the gang's where one process serves it."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the model's own tokenizer, special tokens included.

        Raises:
            LoadError: The model has no usable tokenizer.
        """
        ...

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat, rendered with the model's own template up to where the assistant's answer begins.

        Called for workloads with ``chat_template`` only. An engine without this method refuses them.

        Raises:
            ConfigError: The model has no chat template, or its template refuses these messages.
        """
        ...

    def run(
        self, requests: Sequence[Request], sampling: SamplingSpec, schedule: LoadSchedule | None = None
    ) -> Iterator[StepEvent | RequestRecord]:
        """Serve the requests; yields every step within about 0.1 s of its end, in order, and a record per request.

        Without a schedule they are served together as one batch, as they are. With one, each is sent at its time, or once the
        one that it follows is answered; tokens are delivered as they come, and a record is yielded once its request is answered.
        An engine that can do so says ``serves_online: ClassVar[bool] = True`` in its factory; it gets schedules only where
        ``BackendConfig.online`` is set.

        Raises:
            GenerationError: A prompt exceeds the context, the engine failed, or it serves batches only.
            DeviceMemoryError: The batch does not fit.
            NumericsError: The model produced NaN or Inf logits.
        """
        ...

    def reset(self) -> None:
        """Forget cached prefixes and free what the last trial left behind."""
        ...

    def close(self) -> None:
        """Free the device and end every process the engine started."""
        ...


class FollowerBackend(InferenceBackend, Protocol):
    """A backend of a rank above 0, which does what rank 0 orders, over the engine's own network."""

    def follow(self) -> None:
        """Serve rank 0 until it closes, or until another thread calls ``close`` here.

        Blocks; may be called in every rank but 0, after ``load``.

        Raises:
            GenerationError: The engine failed; rank 0 learns of it by itself.
        """
        ...
