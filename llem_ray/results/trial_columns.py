"""Columns of the ``trials`` table. Names of metrics are those of ``vllm bench serve``, AIPerf and InferenceX where they exist."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from llem_ray.results.column import Column
from llem_ray.results.efficiency_columns import EFFICIENCY_COLUMNS

_STR, _BOOL, _I32, _I64, _F64 = pa.string(), pa.bool_(), pa.int32(), pa.int64(), pa.float64()
_STRINGS, _STRING_MAP = pa.list_(pa.string()), pa.map_(pa.string(), pa.string())

DEVICE = pa.struct(
    [
        ("node", _STR),
        ("uuid", _STR),
        ("name", _STR),
        ("source", _STR),
        ("scope", _STR),
        ("method", _STR),
        ("energy_j", _F64),
        ("u_j", _F64),
        ("bound_lo_j", _F64),
        ("bound_hi_j", _F64),
        ("cross_check_j", _F64),
        ("cross_check_ratio", _F64),
        ("sensor_rel", _F64),
        ("coverage", _F64),
        ("mean_power_w", _F64),
        ("flags", _STRINGS),
        ("reason", _STR),
    ]
)

RANK = pa.struct([("rank", _I32), ("host", _STR), ("pid", _I64), ("gpu_uuid", _STR)])

WORKER = pa.struct(
    [("rank", _I32), ("node", _STR), ("hostname", _STR), ("address", _STR), ("pid", _I64), ("gpu_uuids", _STRINGS)]
)

NODE = pa.struct(
    [
        ("node", _STR),
        ("hostname", _STR),
        ("role", _STR),
        ("workers", _I32),
        ("leased_gpus", _I32),
        ("reported", _BOOL),
        ("leased_energy_j", _F64),
        ("unleased_energy_j", _F64),
        ("cpu_energy_j", _F64),
        ("dram_energy_j", _F64),
        ("coverage", _F64),
        ("max_gap_s", _F64),
        ("clock_offset_ns", _I64),
        ("clock_delta_s", _F64),
        ("reason", _STR),
    ]
)

_IDENTITY = (
    Column("schema_version", _I32, "", "Version of this table's layout."),
    Column("run", _STR, "", "Name of the run."),
    Column("trial_id", _STR, "", "`<cell_id>-r<repeat>`."),
    Column("cell_id", _STR, "", "Hash of the resolved experiment: equal cells have equal ids in every run."),
    Column("repeat", _I32, "", "Repeat of the cell, from 0."),
    Column("attempt", _I32, "", "Attempt at the trial, from 1. A retry is a new attempt with its own row."),
    Column("load_key", _STR, "", "Hash of what was loaded: trials with equal keys may share one loaded model."),
    Column("status", _STR, "", "`completed`, `failed`, or `partial`: a node of the gang did not report its energy."),
    Column("failure_kind", _STR, "", "`out_of_memory`, `numerics`, `hang`, `engine_died` and so on; null unless failed."),
    Column("failure_message", _STR, "", "What went wrong; null unless failed."),
    Column("failure_traceback", _STR, "", "Traceback text; null unless failed."),
    Column("started_utc", pa.timestamp("us"), "UTC", "Wall time at the attempt's begin. Information only: no duration uses it."),
    Column("host", _STR, "", "Host name of the engine's node."),
    Column("node", _STR, "", "Stable id of the engine's node; of a gang on several nodes, the leading one's."),
    Column("gang", _STR, "", "The gang that ran it: trials of one gang share one loaded model."),
)

_EXPERIMENT = (
    Column("settings", _STR, "JSON", "Axis values that made the cell, by dotted key."),
    Column("experiment", _STR, "JSON", "The whole resolved experiment."),
    Column("backend", _STR, "", "Inference engine."),
    Column("engine_version", _STR, "", "Version of the engine's package."),
    Column("model", _STR, "", "Hub id, folder, or name of the config."),
    Column("revision", _STR, "", "Branch, tag or commit that was asked for."),
    Column("model_commit", _STR, "", "Commit of the hub snapshot or of the git folder that was loaded."),
    Column("weights", _STR, "", "`pretrained` or `random`. Random operand values change power."),
    Column("dtype", _STR, "", "Number format of the loaded weights; until loaded, the one asked for."),
    Column("quantization", _STR, "", "Quantisation method."),
    Column("device", _STR, "", "`cpu` or `cuda`; until loaded, the one asked for."),
    Column("tensor_parallel", _I32, "", "GPUs that share each layer."),
    Column("pipeline_parallel", _I32, "", "Groups of layers."),
    Column("data_parallel", _I32, "", "Replicas of the whole model."),
    Column("gpus", _I32, "", "Whole GPUs leased; 0 on the CPU."),
    Column("engine_args", _STR, "JSON", "Arguments passed to the engine as they are."),
    Column("prompt_source", _STR, "", "Where prompts came from."),
    Column("batch_size", _I32, "", "Requests that ran together; null under an online load."),
    Column("load_pattern", _STR, "", "How requests reached the engine: `batch`, or the pattern of an online load."),
    Column("rate_per_s", _F64, "1/s", "Requests per s asked for, with turns conversations; null where the pattern has none."),
    Column("burstiness", _F64, "1", "Shape of the gamma distribution of gaps between arrivals; null but for `gamma`."),
    Column(
        "concurrency",
        _I32,
        "",
        "Requests kept in flight, with turns open conversations; null where the pattern has none, or the engine sets the limit.",
    ),
    Column("turns", _I32, "", "Requests of each conversation; 1 where there are none, null where they vary."),
    Column("conversations", _I64, "", "Conversations of the run, all passes; null without turns."),
    Column("turns_mean", _F64, "", "Mean of their turns, as realised; null without turns."),
    Column("turns_max", _I32, "", "Most turns of one of them; null without turns."),
    Column("turn_answers", _STR, "", "Answers in later prompts: `known` or `generated`; null where there are none."),
    Column("think_time_s", _F64, "s", "From an answer to when the next turn is due; null where there is none or it varies."),
    Column("trace", _STR, "", "Trace of arrivals that was replayed."),
    Column("input_tokens", _I64, "tokens", "Exact prompt length asked for; null for natural lengths and distributions."),
    Column("output_tokens_requested", _I64, "tokens", "Tokens asked for per request; null for distributions."),
    Column("ignore_eos", _BOOL, "", "Generation went on after an end-of-sequence token."),
    Column("workload_seed", _I64, "", "Seed of the choice and order of prompts."),
    Column("temperature", _F64, "", "0 is greedy."),
    Column("top_k", _I32, "", "The k most likely tokens were kept."),
    Column("top_p", _F64, "", "Probability mass that was kept."),
    Column("sampling_seed", _I64, "", "Seed of the draws."),
    Column("parameters", _I64, "", "Parameters of the model."),
    Column("weight_bytes", _I64, "bytes", "Size of the loaded weights."),
    Column("context_tokens", _I64, "tokens", "Longest prompt plus output the model takes."),
    Column("engine_facts", _STRING_MAP, "", "Further facts: attention implementation, tokenizer origin and so on."),
)

_COUNTS = (
    Column("begin_ns", _I64, "ns", "Begin of the measured window; monotonic clock of the engine's node."),
    Column("end_ns", _I64, "ns", "End of the measured window; same clock."),
    Column("window_s", _F64, "s", "Length of the measured window."),
    Column("window_rule", _STR, "", "Which part of the run the window is: `total`, `steady_state`, `mlperf` or `interval`."),
    Column("requests", _I64, "", "Requests that ended in the window, failed ones included."),
    Column("passes", _I32, "", "Times the workload was repeated to fill the window."),
    Column(
        "prompt_tokens",
        _I64,
        "tokens",
        "Prompt tokens counted from ids, of requests whose first token came in the window, and of those that were sent in it and"
        " gave none.",
    ),
    Column("failed_prompt_tokens", _I64, "tokens", "Those of prompt_tokens whose requests failed."),
    Column(
        "shared_prompt_tokens",
        _I64,
        "tokens",
        "Those of prompt_tokens that an earlier request of the pass had, or got as its answer, by construction.",
    ),
    Column("padded_tokens", _I64, "tokens", "Prompt lengths after padding, summed."),
    Column("output_tokens", _I64, "tokens", "Tokens delivered in the window, counted from ids."),
    Column("total_tokens", _I64, "tokens", "prompt_tokens + output_tokens."),
    Column("steps", _I64, "", "Forward steps of the engine in the window."),
    Column("prompt_tokens_min", _I64, "tokens", "Shortest prompt of the requests that ended in the window."),
    Column("prompt_tokens_mean", _F64, "tokens", "Mean prompt length of the requests that ended in the window."),
    Column("prompt_tokens_max", _I64, "tokens", "Longest prompt of the requests that ended in the window."),
    Column("output_tokens_min", _I64, "tokens", "Shortest output of the requests that ended in the window."),
    Column("output_tokens_mean", _F64, "tokens", "Mean output length of the requests that ended in the window."),
    Column("output_tokens_max", _I64, "tokens", "Longest output of the requests that ended in the window."),
    Column("realised_concurrency", _I32, "", "The most requests that were being answered at one instant; online trials."),
    Column("run_begin_ns", _I64, "ns", "Begin of the whole online run, of which the window is a part; same clock."),
    Column("run_end_ns", _I64, "ns", "When its last answer had come; same clock."),
    Column("run_s", _F64, "s", "Length of the whole run."),
    Column("run_requests", _I32, "", "Requests of the whole run."),
    Column("run_prompt_tokens", _I64, "tokens", "Prompt tokens of the whole run."),
    Column("run_output_tokens", _I64, "tokens", "Tokens generated in the whole run."),
)

_ENERGY = (
    Column(
        "total_energy_j",
        _F64,
        "J",
        "Measured energy of the window, summed over what `energy_covers` lists. Null when a part is missing.",
    ),
    Column("total_gpu_energy_j", _F64, "J", "The same over the leased GPUs only; null on the CPU."),
    Column("energy_u_j", _F64, "J", "One sigma of sampling of total_energy_j."),
    Column(
        "energy_uncertainty_j",
        _F64,
        "J",
        "U = 2 x energy_u_j: about 95 % of truths lie within total_energy_j +- U, sensor gain apart.",
    ),
    Column("energy_sensor_j", _F64, "J", "Systematic gain error of the sensors, summed linearly. Never part of U."),
    Column("sensor_rel", _F64, "1", "energy_sensor_j / total_energy_j."),
    Column("energy_bound_lo_j", _F64, "J", "Hard lower bound from the raw counter readings."),
    Column("energy_bound_hi_j", _F64, "J", "Hard upper bound from the raw counter readings."),
    Column("cross_check_j", _F64, "J", "The same energy by the independent one-second average power."),
    Column("cross_check_ratio", _F64, "1", "cross_check_j over the counter's energy of the same stretch of time."),
    Column("coverage", _F64, "1", "Samples arrived over samples expected, the worst device."),
    Column("energy_source", _STR, "", "Power source of the total."),
    Column(
        "energy_method", _STR, "", "`measured_counter`, `measured_power_integral` or `unavailable`; the weakest of the parts."
    ),
    Column("energy_covers", _STRINGS, "", "`<source>/<scope>/<uuid>` of every device in the total."),
    Column("energy_not_measured", _STRINGS, "", "What was not measured: `cpu_package`, `dram`, `network`, `fans`."),
    Column("energy_reason", _STR, "", "Why there is no total."),
    Column(
        "host_cpu_energy_j",
        _F64,
        "J",
        "Measured energy of the CPU packages of the gang's nodes. Part of the total only where it covers them.",
    ),
    Column(
        "dram_energy_j",
        _F64,
        "J",
        "Measured energy of the memory of the gang's nodes. Part of the total only where it covers it.",
    ),
    Column("idle_power_w", _F64, "W", "Idle power that net energy uses: model loaded, before the trial."),
    Column("bare_idle_power_w", _F64, "W", "Idle power before the model was loaded."),
    Column("idle_energy_j", _F64, "J", "idle_power_w x window_s."),
    Column("net_energy_j", _F64, "J", "total_energy_j - idle_energy_j, signed. Read it beside the gross energy only."),
    Column("net_energy_u_j", _F64, "J", "One sigma of net_energy_j, the baseline's drift included."),
    Column("load_energy_j", _F64, "J", "Energy of loading the model, once per load: the same value in all trials of the load."),
    Column("waste_energy_j", _F64, "J", "Energy of this failed attempt."),
    Column("joules_per_output_token", _F64, "J/token", "total_energy_j / output_tokens. Null unless power_valid."),
    Column("joules_per_input_token", _F64, "J/token", "total_energy_j / prompt_tokens. It is not prefill energy."),
    Column("joules_per_total_token", _F64, "J/token", "total_energy_j / total_tokens."),
    Column("joules_per_successful_query", _F64, "J", "total_energy_j / requests that succeeded."),
    Column("output_tokens_per_joule", _F64, "token/J", "output_tokens / total_energy_j."),
    Column("run_energy_j", _F64, "J", "Measured energy of the whole online run, summed as total_energy_j; null for batches."),
    Column("run_energy_u_j", _F64, "J", "One sigma of sampling of run_energy_j."),
    Column(
        "run_joules_per_output_token",
        _F64,
        "J/token",
        "run_energy_j / run_output_tokens. Null unless power_valid and the whole run is.",
    ),
    Column("avg_power_w", _F64, "W", "Mean power of one leased GPU; null on the CPU."),
    Column("avg_total_gpu_power_w", _F64, "W", "Mean power of all leased GPUs together."),
    Column("energy_delay_product_js", _F64, "J s", "total_energy_j x window_s."),
    Column("est_cpu_energy_j", _F64, "J", "Estimated by a model of the CPU, not measured; never in a measured total."),
    Column("est_dram_energy_j", _F64, "J", "Estimated by a model of the memory, not measured; never in a measured total."),
    Column("est_energy_j", _F64, "J", "All estimates of the window together."),
    Column("est_joules_per_output_token", _F64, "J/token", "est_energy_j / output_tokens. Shown as `est.`."),
    Column("est_reason", _STR, "", "How the estimate was made, or why there is none."),
    Column("power_valid", _BOOL, "", "There is a total and nothing in `invalid_reasons`."),
    Column("invalid_reasons", _STRINGS, "", "Reason codes that make the energy invalid."),
    Column("flags", _STRINGS, "", "Reason codes to keep in mind; the energy is valid."),
    Column("notes", _STRINGS, "", "Reason codes for information."),
    Column("reason_details", _STRING_MAP, "", "Reason code -> what was seen."),
    Column("null_reasons", _STRING_MAP, "", "Column -> why it is null, where that is not plain."),
    Column("devices", pa.list_(DEVICE), "J, W", "Every device of the gang's nodes: its own energy, method, checks and flags."),
    Column("ranks", pa.list_(RANK), "", "Every rank of the gang as its engine sees it: host, process and GPU."),
    Column("workers", pa.list_(WORKER), "", "Every process of the gang as it was placed: node, address, process, GPUs granted."),
    Column("gang_nodes", pa.list_(NODE), "J, s", "Every node of the gang: what was leased, what it spent, what was seen of it."),
    Column("nodes_expected", _I32, "", "Nodes of the gang."),
    Column("nodes_reported", _I32, "", "Those whose leased devices all have an energy. Fewer than expected: no total."),
    Column("max_gap_s", _F64, "s", "Longest stretch of the window without a sample of a leased device."),
    Column(
        "clock_delta_s",
        _F64,
        "s",
        "Half-width of the window's offset on another node's clock, the worst of the gang; part of energy_u_j.",
    ),
    Column(
        "unleased_gpu_energy_j", _F64, "J", "GPUs of the gang's nodes that it did not hold. Context, never part of the total."
    ),
    Column("other_nodes_gpu_energy_j", _F64, "J", "GPUs of all other nodes, by plain counter difference. Context."),
    Column("other_nodes_expected", _I32, "", "Nodes outside the gang that were sampled in this run."),
    Column("other_nodes_reported", _I32, "", "Those of them whose GPUs all have an energy."),
    Column("cluster_gpu_energy_j", _F64, "J", "All GPUs of the cluster together; null when one is missing. Context."),
    Column(
        "idle_bubble_share",
        _F64,
        "1",
        "Share of the window that leased GPUs spent near idle power (up to idle + 10 % of busy - idle).",
    ),
    Column("power_drift_rel", _F64, "1", "Power of the window's second half over that of the first, less 1; from 10 s on."),
    Column("power_trend_p", _F64, "1", "p-value of Mann-Kendall's test for a trend of power over 20 bins of the window."),
    Column("throughput_drift_rel", _F64, "1", "The same of output tokens per second."),
    Column("throughput_trend_p", _F64, "1", "The same of output tokens per second."),
    Column("rank_imbalance", _F64, "1", "(Largest - smallest) / mean of the leased devices' energies."),
)

LATENCY_METRICS: Final = {
    "ttft_s": "First token less sent",
    "tpot_s": "(Last less first token) / (output tokens - 1), requests of two and more tokens",
    "e2e_latency_s": "Last token less sent",
    "e2e_from_schedule_s": "Last token less scheduled",
    "inter_chunk_s": "Gaps between consecutive deliveries, pooled over requests",
    "normalized_tpot_s": "End-to-end latency / output tokens",
}
"""Latency metric -> its definition. Each has one column per statistic: ``<metric>_<statistic>``."""

STATISTICS: Final = {
    "mean": "mean",
    "std": "standard deviation (ddof 0)",
    "min": "smallest",
    "p50": "median",
    "p90": "90th percentile",
    "p95": "95th percentile",
    "p99": "99th percentile",
    "max": "largest",
}
"""Statistic -> its name. Percentiles are numpy's ``linear``."""

ADJUSTED_METRICS: Final = ("ttft_s", "tpot_s", "e2e_latency_s")
"""Latency metrics that have percentiles with failures counted, too: ``adj_<metric>_<percentile>``."""

ADJUSTED_STATISTICS: Final = ("p50", "p90", "p95", "p99")

INTERVAL_METRICS: Final = ("ttft_s", "tpot_s", "e2e_latency_s", "e2e_from_schedule_s", "inter_chunk_s")
"""Latency metrics whose percentiles have intervals: ``<metric>_<percentile>_lo`` and ``_hi``."""

_LATENCY = (
    *(
        Column(f"{metric}_{statistic}", _F64, "s", f"{definition}; {name} over the window's successful requests.")
        for metric, definition in LATENCY_METRICS.items()
        for statistic, name in STATISTICS.items()
    ),
    *(
        Column(
            f"adj_{metric}_{statistic}",
            _F64,
            "s",
            f"{LATENCY_METRICS[metric]}; {STATISTICS[statistic]} with each failed request counted as infinitely late.",
        )
        for metric in ADJUSTED_METRICS
        for statistic in ADJUSTED_STATISTICS
    ),
    *(
        Column(
            f"{metric}_{statistic}_{end}",
            _F64,
            "s",
            f"{name} end of the 95 % interval over requests.",
        )
        for metric in INTERVAL_METRICS
        for statistic in ADJUSTED_STATISTICS
        for end, name in (("lo", "Lower"), ("hi", "Upper"))
    ),
    Column("latency_interval_reason", _STR, "", "Why some or all percentiles have no interval."),
)

_GOODPUT = (
    Column("failed_requests", _I64, "", "Requests of the window that were aborted or gave no token."),
    Column("slo_ttft_ms", _F64, "ms", "Limit on the time to first token; null without one."),
    Column("slo_tpot_ms", _F64, "ms", "Limit on the time per output token; null without one."),
    Column("slo_e2e_ms", _F64, "ms", "Limit on the end-to-end latency; null without one."),
    Column("goodput_req_s", _F64, "1/s", "Requests that keep all limits / serving_s; null without limits."),
    Column("slo_attainment", _F64, "1", "Requests that keep all limits / requests, failed ones included; null without limits."),
    Column("goodput_per_watt", _F64, "1/J", "goodput_req_s / (total_energy_j / window_s). Null unless power_valid."),
)

_THROUGHPUT = (
    Column(
        "serving_s",
        _F64,
        "s",
        "First request sent to last token: the duration of the throughputs. window_s where the window is part of an online run.",
    ),
    Column("output_throughput_tok_s", _F64, "token/s", "output_tokens / serving_s."),
    Column("total_token_throughput_tok_s", _F64, "token/s", "total_tokens / serving_s."),
    Column("request_throughput_req_s", _F64, "1/s", "Requests that succeeded / serving_s."),
    Column("throughput_per_gpu_tok_s", _F64, "token/s", "output_throughput_tok_s / (tensor x pipeline x data parallel GPUs)."),
)

_PACE = (
    Column(
        "asked_rate_per_s",
        _F64,
        "1/s",
        "(n - 1) / (last - first) of the times the schedule wanted; with turns, those of first turns.",
    ),
    Column("sent_rate_per_s", _F64, "1/s", "The same of the times requests were sent."),
    Column(
        "achieved_rate_per_s",
        _F64,
        "1/s",
        "The asked rate x the time between the quartiles of the schedule over that of the answers x the share answered.",
    ),
    Column("pacing_error_p50_s", _F64, "s", "Sent less scheduled, median over the run's requests."),
    Column("pacing_error_p90_s", _F64, "s", "Sent less scheduled, 90th percentile."),
    Column("pacing_error_p99_s", _F64, "s", "Sent less scheduled, 99th percentile."),
    Column("pacing_error_max_s", _F64, "s", "Sent less scheduled, largest."),
    Column("warmup_batches", _I32, "", "Batches that ran before the window."),
    Column("warmup_end", _STR, "", "Why they ended: `fixed` (as many as asked), `steady`, or `limit` (not steady by then)."),
    Column("warmup_step_cv", _F64, "1", "Coefficient of variation of the last 5 warm-up batches' step times, where asked for."),
    Column(
        "warmup_power_cv",
        _F64,
        "1",
        "The same of the gang's mean power over the last 5 stretches of at least 0.5 s, where measured.",
    ),
)

_LOAD = (
    Column("import_s", _F64, "s", "Importing the engine, once per load."),
    Column("construct_s", _F64, "s", "Building the model and reading its weights, once per load."),
    Column("compile_s", _F64, "s", "Compiling, once per load; null where the engine does not tell it apart."),
    Column("warm_s", _F64, "s", "The engine's own warm-up, once per load; null where it does not tell it apart."),
    Column("gap_s", _F64, "s", "The orchestrator's own time since the trial before, guards not included."),
)

TRIAL_COLUMNS: Final[tuple[Column, ...]] = (
    *_IDENTITY,
    *_EXPERIMENT,
    *_COUNTS,
    *_ENERGY,
    *EFFICIENCY_COLUMNS,
    *_LATENCY,
    *_THROUGHPUT,
    *_GOODPUT,
    *_PACE,
    *_LOAD,
)
"""All columns of the ``trials`` table, in order."""
