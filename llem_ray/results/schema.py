"""The tables of a run's dataset: every column with its type, unit and meaning. The docs are generated from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple, get_args

import pyarrow as pa

from llem_ray.core.errors import ResultsError
from llem_ray.results.column import Column, type_name
from llem_ray.results.trial_columns import TRIAL_COLUMNS

SCHEMA_VERSION: Final = 1
"""Raised when a column is renamed, removed or changes its meaning; new columns do not raise it."""

TableName = Literal["trials", "requests", "steps", "loads", "power", "states", "phases", "nodes", "clocks"]

TABLE_NAMES: Final[tuple[TableName, ...]] = get_args(TableName)

_KEYS = (
    Column("run", pa.string(), "", "Name of the run."),
    Column("trial_id", pa.string(), "", "Trial, see `trials`."),
    Column("attempt", pa.int32(), "", "Attempt, see `trials`."),
)

_REQUESTS = (
    *_KEYS,
    Column("request_id", pa.string(), "", "Request within the trial: `<pass>-<index>`."),
    Column("in_window", pa.bool_(), "", "It ended in the measured window; others of an online run are here too."),
    Column("conversation", pa.int64(), "", "Number of its conversation in the pass; null without `turns`."),
    Column("turn", pa.int32(), "", "Number of its turn in the conversation, from 0; null without `turns`."),
    Column("prompt_tokens", pa.int64(), "tokens", "Prompt length counted from ids, padding not included."),
    Column(
        "shared_prompt_tokens",
        pa.int64(),
        "tokens",
        "Leading prompt tokens that an earlier request of the pass had, or got as its answer, by construction: a shared prefix,"
        " earlier turns, blocks of a trace.",
    ),
    Column("padded_tokens", pa.int64(), "tokens", "Length the prompt was padded to."),
    Column("output_tokens", pa.int64(), "tokens", "Tokens generated, counted from ids."),
    Column("output_tokens_requested", pa.int64(), "tokens", "Tokens asked for."),
    Column("finish_reason", pa.string(), "", "`length`, `stop` or `abort`."),
    Column("output_chunks", pa.int64(), "", "Deliveries of output tokens: fewer than tokens where several came at once."),
    Column(
        "cached_tokens", pa.int64(), "tokens", "Prompt tokens that a prefix cache saved; null where the engine does not tell."
    ),
    Column("draft_tokens", pa.int64(), "tokens", "Tokens that speculation proposed; null without speculation."),
    Column("accepted_tokens", pa.int64(), "tokens", "Proposed tokens that became output; null without speculation."),
    Column("scheduled_ns", pa.int64(), "ns", "When the load schedule wanted it sent; monotonic clock of the engine's node."),
    Column("queued_ns", pa.int64(), "ns", "When it entered the load generator's queue; same clock."),
    Column("sent_ns", pa.int64(), "ns", "Just before it was handed to the engine; same clock."),
    Column("first_token_ns", pa.int64(), "ns", "When its first token was delivered; same clock."),
    Column("last_token_ns", pa.int64(), "ns", "When its last token was delivered; same clock."),
    Column("ttft_s", pa.float64(), "s", "First token less sent."),
    Column("tpot_s", pa.float64(), "s", "(Last token less first token) / (output tokens - 1); null for a single token."),
    Column("e2e_latency_s", pa.float64(), "s", "Last token less sent."),
    Column("e2e_from_schedule_s", pa.float64(), "s", "Last token less scheduled."),
    Column("normalized_tpot_s", pa.float64(), "s", "e2e_latency_s / output tokens."),
    Column(
        "energy_j",
        pa.float64(),
        "J",
        "Its share of the window's energy by `trials.request_energy_rule`; those of a trial add up to total_energy_j. Null unless"
        " power_valid.",
    ),
    Column("token_times_ns", pa.list_(pa.int64()), "ns", "When each token was delivered; same clock. Null when not kept."),
)

_STEPS = (
    *_KEYS,
    Column("begin_ns", pa.int64(), "ns", "When the step began; monotonic clock of the engine's node."),
    Column("end_ns", pa.int64(), "ns", "When it ended; same clock."),
    Column("kind", pa.string(), "", "`prefill`, `decode` or `mixed`."),
    Column("prefill_tokens", pa.int64(), "tokens", "Prompt tokens computed, padding not included."),
    Column("decode_tokens", pa.int64(), "tokens", "Output tokens produced; a prefill step yields the first of each request."),
    Column("computed_tokens", pa.int64(), "tokens", "Token positions computed, padding and finished rows included."),
    Column("flops", pa.float64(), "FLOP", "Floating-point operations, as the engine counts them; null where it does not."),
    Column(
        "read_bytes", pa.float64(), "bytes", "Bytes read from device memory, as the engine counts them; null where it does not."
    ),
)

_SAMPLE_KEYS = (
    Column("run", pa.string(), "", "Name of the run."),
    Column("node", pa.string(), "", "Stable id of the host that sampled."),
    Column("epoch", pa.int32(), "", "Counts the sampler's restarts on that host."),
    Column("device_uuid", pa.string(), "", "Device, see `nodes.devices`."),
    Column("t_ns", pa.int64(), "ns", "When it was read: middle of the call, monotonic clock of the node."),
)

_POWER = (
    *_SAMPLE_KEYS,
    Column("hw_ns", pa.int64(), "ns", "Half the time the call took."),
    Column("power_mw", pa.float64(), "mW", "Instant power; null when it was not read."),
    Column("power_avg_mw", pa.float64(), "mW", "One-second average power; null when it was not read."),
    Column("energy_mj", pa.float64(), "mJ", "Cumulative energy counter, register wraps undone; null when it was not read."),
    Column("error", pa.string(), "", "Why a reading is missing."),
)

_STATES = (
    *_SAMPLE_KEYS,
    Column("temperature_c", pa.float64(), "degC", "Temperature of the chip."),
    Column("sm_clock_mhz", pa.float64(), "MHz", "Clock of the multiprocessors."),
    Column("memory_clock_mhz", pa.float64(), "MHz", "Clock of the memory."),
    Column("clock_event_mask", pa.int64(), "", "NVML clocks-event reasons, bit mask."),
    Column("memory_used_bytes", pa.int64(), "bytes", "Device memory in use."),
    Column("process_count", pa.int32(), "", "Processes on the device."),
    Column("power_limit_mw", pa.float64(), "mW", "Enforced power limit."),
)

_PHASES = (
    Column("run", pa.string(), "", "Name of the run."),
    Column("gang", pa.string(), "", "The workers that held the device; null outside any gang."),
    Column("node", pa.string(), "", "Stable id of the device's host."),
    Column("device_uuid", pa.string(), "", "Device, see `nodes.devices`."),
    Column("phase", pa.string(), "", "Ledger phase: `load`, `warmup`, `guard`, `measured`, `gap` and so on."),
    Column("begin_ns", pa.int64(), "ns", "Begin; monotonic clock of the device's node."),
    Column("end_ns", pa.int64(), "ns", "End; same clock. The spans of a device adjoin."),
    Column("duration_s", pa.float64(), "s", "End less begin."),
    Column("trial_id", pa.string(), "", "Trial the span belongs to, or null."),
    Column("attempt", pa.int32(), "", "Attempt the span belongs to, or null."),
    Column("energy_j", pa.float64(), "J", "Energy of the device over the span; null with a reason."),
    Column("u_j", pa.float64(), "J", "One sigma of sampling. Boundaries are shared: u of a sum comes from its outer edges only."),
    Column("method", pa.string(), "", "`measured_counter`, `measured_power_integral`, `estimated_model` or `unavailable`."),
    Column("reason", pa.string(), "", "Why the energy is null."),
    Column("notes", pa.map_(pa.string(), pa.string()), "", "Further facts."),
)

_NODE_DEVICE = pa.struct(
    [
        ("uuid", pa.string()),
        ("name", pa.string()),
        ("source", pa.string()),
        ("scope", pa.string()),
        ("method", pa.string()),
        ("index", pa.int32()),
        ("counter_quantum_mj", pa.float64()),
        ("power_limit_mw", pa.float64()),
        ("sensor_rel", pa.float64()),
        ("shared", pa.bool_()),
        ("reason", pa.string()),
        ("tick_period_s", pa.float64()),
        ("has_instant", pa.bool_()),
        ("has_average", pa.bool_()),
        ("lag_s", pa.float64()),
        ("call_s", pa.float64()),
    ]
)

_NODES = (
    Column("run", pa.string(), "", "Name of the run."),
    Column("node", pa.string(), "", "Stable host id."),
    Column("hostname", pa.string(), "", "Host name."),
    Column("epoch", pa.int32(), "", "Counts the sampler's restarts on this host; one row each."),
    Column("sampler_pid", pa.int64(), "", "Process id of the sampler."),
    Column("recorded_utc", pa.timestamp("us"), "UTC", "When this row was made. Information only."),
    Column("sample_hz", pa.float64(), "Hz", "Polls per second."),
    Column("devices", pa.list_(_NODE_DEVICE), "", "Every device the sampler reads, with its calibration."),
    Column("unavailable", pa.map_(pa.string(), pa.string()), "", "Power source -> why it gives nothing on this host."),
    Column("nvidia_driver", pa.string(), "", "Version of the NVIDIA driver."),
    Column("gpu_names", pa.list_(pa.string()), "", "Names of the GPUs, in the order of `devices`."),
    Column("cpu_model", pa.string(), "", "CPU model."),
    Column("cpu_count_logical", pa.int32(), "", "Logical CPUs."),
    Column("cpu_governor", pa.string(), "", "Frequency governor of the CPU."),
    Column("memory_bytes", pa.int64(), "bytes", "Memory of the host."),
    Column("kernel", pa.string(), "", "Kernel release."),
    Column("container", pa.string(), "", "Kind of container the sampler ran in, or null."),
    Column("host", pa.string(), "JSON", "All host facts the sampler gathered."),
    Column(
        "notes", pa.list_(pa.string()), "", "What the sampler did about trouble: slowed down, lost its spool, ended its lease."
    ),
    Column("versions", pa.map_(pa.string(), pa.string()), "", "Package -> version in the run driver's environment."),
)

_LOADS = (
    Column("run", pa.string(), "", "Name of the run."),
    Column("gang", pa.string(), "", "The gang that holds the loaded model, see `trials.gang`."),
    Column("load_key", pa.string(), "", "Hash of what was loaded, see `trials.load_key`."),
    Column("backend", pa.string(), "", "Inference engine."),
    Column("engine_version", pa.string(), "", "Version of the engine's package."),
    Column("host", pa.string(), "", "Host name of the engine's node."),
    Column("trial_id", pa.string(), "", "First trial on the loaded model."),
    Column("attempt", pa.int32(), "", "Attempt at that trial."),
    Column("startup_s", pa.float64(), "s", "Start of the command until engines may start: cluster, samplers, engine checks."),
    Column("queue_s", pa.float64(), "s", "Until the gang was asked for: it waited for room, or for loads before it."),
    Column("place_s", pa.float64(), "s", "Until the gang's processes ran where they were placed."),
    Column("bare_idle_s", pa.float64(), "s", "Until the load began: the idle baseline before it."),
    Column("process_start_s", pa.float64(), "s", "Starting the engine's own process; null where it has none."),
    Column("import_s", pa.float64(), "s", "Importing the engine."),
    Column("construct_s", pa.float64(), "s", "Building the model and reading its weights."),
    Column("compile_s", pa.float64(), "s", "Compiling; null where the engine does not tell it apart."),
    Column("warm_s", pa.float64(), "s", "The engine's own warm-up; null where it does not tell it apart."),
    Column("load_rest_s", pa.float64(), "s", "The rest of the load: checks, tokenizer, messages, ranks that meet."),
    Column("resident_idle_s", pa.float64(), "s", "Until the trial was ordered: the idle baseline with the model loaded."),
    Column("prepare_s", pa.float64(), "s", "Until the trial began at the engine: the order's way, prompts to token ids."),
    Column("warmup_s", pa.float64(), "s", "The trial's warm-up batches."),
    Column("guard_s", pa.float64(), "s", "Quiet time before the window."),
    Column(
        "first_token_s",
        pa.float64(),
        "s",
        "Until the first token of any request: from the begin of the window, or of an online run.",
    ),
    Column("load_s", pa.float64(), "s", "The whole load: process_start_s to load_rest_s."),
    Column("submit_to_first_token_s", pa.float64(), "s", "Sum of startup_s to first_token_s."),
    Column("reason", pa.string(), "", "Why times are null: how the load or its first attempt failed."),
)

_CLOCKS = (
    Column("run", pa.string(), "", "Name of the run."),
    Column("node", pa.string(), "", "Stable host id."),
    Column("generation", pa.int32(), "", "Counts the host's restarts while the run went on: its clock began anew each time."),
    Column("run_ns", pa.int64(), "ns", "Monotonic clock of the run driver's host."),
    Column("offset_ns", pa.int64(), "ns", "The node's clock less run_ns at that instant."),
    Column("delta_ns", pa.int64(), "ns", "Half-width of the interval that holds the true offset."),
)

COLUMNS: Final[Mapping[TableName, tuple[Column, ...]]] = {
    "trials": TRIAL_COLUMNS,
    "requests": _REQUESTS,
    "steps": _STEPS,
    "loads": _LOADS,
    "power": _POWER,
    "states": _STATES,
    "phases": _PHASES,
    "nodes": _NODES,
    "clocks": _CLOCKS,
}
"""Table -> its columns, in order."""

DESCRIPTIONS: Final[Mapping[TableName, str]] = {
    "trials": "One row per attempt at a trial, good or failed.",
    "requests": "One row per request of a measured window; of an online trial, one per request of the whole run.",
    "steps": "One row per forward step of an engine in a measured window; of an online trial, in its whole run.",
    "loads": (
        "One row per load of a model: the time from the start of the command to the first token of its first window, part by "
        "part. Each part begins where the one before ends; a null part counts as 0."
    ),
    "power": "One row per poll of one device: the raw samples that every joule comes from.",
    "states": "One row per slow-lane reading of one device, about once a second.",
    "phases": "One row per device and phase: the energy ledger that tiles the run.",
    "nodes": "One row per sampler start: the host, its devices and their calibration.",
    "clocks": "About every 30 s, each host's monotonic clock beside the run driver's.",
}


class SchemaRow(NamedTuple):
    """One line of the generated schema reference."""

    table: TableName
    column: str
    type: str
    unit: str
    description: str


def table_schema(table: TableName) -> pa.Schema:
    """Arrow schema of ``table``; unit and description are field metadata, the version is schema metadata."""
    return pa.schema(
        [column.field() for column in COLUMNS[table]],
        metadata={"llem_ray.table": table, "llem_ray.schema_version": str(SCHEMA_VERSION)},
    )


SCHEMAS: Final[Mapping[TableName, pa.Schema]] = {table: table_schema(table) for table in TABLE_NAMES}
"""Table -> its Arrow schema."""


def schema_reference() -> Iterator[SchemaRow]:
    """Every column of every table, in order, for the generated reference page."""
    for table in TABLE_NAMES:
        for column in COLUMNS[table]:
            yield SchemaRow(table, column.name, type_name(column.type), column.unit, column.description)


def check_schema_version(metadata: Mapping[bytes, bytes] | None, source: str) -> None:
    """Refuse a table that another, incompatible version wrote.

    Raises:
        ResultsError: ``metadata`` names no schema version, or one this llem-ray cannot read.
    """
    found = (metadata or {}).get(b"llem_ray.schema_version")
    if found != str(SCHEMA_VERSION).encode():
        told = found.decode(errors="replace") if found else "none"
        raise ResultsError(
            f"{source} has schema version {told}; this llem-ray reads version {SCHEMA_VERSION}",
            "read it with the llem-ray that wrote it: environment.json in the run directory names the version",
        )
