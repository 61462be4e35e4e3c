"""Fields of other servers, which their clients send here too.

A field that a body declares is honoured. Any other field of this table is accepted where it changes nothing, and refused by
name where it would change something. The table stands in docs/api.md as well: `python -m tests.service.api.peers_table`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class PeerField(NamedTuple):
    names: str
    servers: str  # some that have it
    values: tuple[Any, ...] = ()  # change nothing; nor does null
    part_of: str | None = None  # no value changes anything while this field is at its default
    warning: str | None = None  # why other values of the same type are accepted, but have no effect

    @property
    def accepted(self) -> str:
        return ", ".join(json.dumps(value) for value in (None, *self.values))

    @property
    def schema(self) -> dict[str, Any]:
        """Of all values that are accepted somewhere."""
        return {} if self.part_of or self.warning else {"enum": [None, *self.values]}


OFF, ON, EITHER = (False,), (True,), (True, False)
NO_TOOLS = "this server makes no tool calls"
ALL_TOKENS = "penalties here count every token of the text, line breaks too"
NO_REASONING = "this server's models do not reason ahead of an answer"

PEER_FIELDS = (
    PeerField(
        "top_k min_p repetition_penalty ignore_eos skip_special_tokens", "vLLM, SGLang, llama.cpp, text-generation-webui"
    ),
    PeerField("min_tokens stop_token_ids include_stop_str_in_output bad_words allowed_token_ids", "vLLM"),
    PeerField("prompt_logprobs return_token_ids truncate_prompt_tokens add_special_tokens", "vLLM"),
    PeerField("cache_prompt", "llama.cpp"),
    PeerField("continue_final_message", "vLLM, SGLang", OFF),
    PeerField("add_generation_prompt", "vLLM", EITHER),
    PeerField("tools functions", "OpenAI", ([],), warning=NO_TOOLS),
    PeerField("tool_choice function_call", "OpenAI", ("none", "auto")),
    PeerField("parallel_tool_calls", "OpenAI", EITHER),
    PeerField("parse_tool_calls", "llama.cpp", EITHER),
    PeerField("reasoning_effort", "OpenAI", ("none", "medium"), warning=NO_REASONING),
    PeerField("reasoning", "OpenRouter", ({},), warning=NO_REASONING),
    PeerField("thinking", "LiteLLM", ({"type": "disabled"},), warning=NO_REASONING),
    PeerField("enable_thinking", "SGLang", OFF, warning=NO_REASONING),
    PeerField("include_reasoning separate_reasoning stream_reasoning", "vLLM, SGLang", EITHER),
    PeerField("reasoning_format", "llama.cpp", ("none", "auto")),
    PeerField("reasoning_in_content thinking_forced_open", "llama.cpp", OFF),
    PeerField("thinking_token_budget reasoning_budget thinking_budget_tokens", "vLLM, llama.cpp", (-1, 0)),
    PeerField("response_format", "OpenAI", ({"type": "text"},)),
    PeerField("guided_json guided_regex guided_choice guided_grammar structured_outputs structural_tag", "vLLM"),
    PeerField("guided_decoding_backend guided_whitespace_pattern", "vLLM"),
    PeerField("json_schema regex ebnf", "SGLang, llama.cpp"),
    PeerField("grammar grammar_string", "llama.cpp, text-generation-webui", ("",)),
    PeerField("grammar_lazy", "llama.cpp", OFF),
    PeerField("grammar_triggers preserved_tokens", "llama.cpp", ([],)),
    PeerField("modalities", "OpenAI", (["text"],)),
    PeerField("audio moderation prediction prompt_cache_options web_search_options", "OpenAI"),
    PeerField("prompt_cache_retention", "OpenAI", ("in-memory", "in_memory")),
    PeerField("service_tier", "OpenAI", ("auto", "default")),
    PeerField("verbosity", "OpenAI", ("medium",)),
    PeerField("store", "OpenAI", OFF),
    PeerField("best_of", "OpenAI", (1,)),
    PeerField("echo", "OpenAI", OFF),
    PeerField("use_beam_search early_stopping return_tokens_as_token_ids", "vLLM", OFF),
    PeerField("length_penalty num_beams", "vLLM, text-generation-webui", (1,)),
    PeerField("spaces_between_special_tokens", "vLLM", EITHER),
    PeerField("priority", "vLLM", (0,)),
    PeerField("logits_processors documents", "vLLM", ([],)),
    PeerField("mm_processor_kwargs vllm_xargs", "vLLM", ({},)),
    PeerField("chat_template_kwargs", "vLLM, SGLang, llama.cpp", ({}, {"enable_thinking": False}, {"thinking": False})),
    PeerField("prompt_embeds cache_salt kv_transfer_params chat_template request_id logprob_token_ids", "vLLM"),
    PeerField("no_stop_trim return_hidden_states return_routed_experts", "SGLang and its router", OFF),
    PeerField("return_cached_tokens_details return_meta_info", "SGLang", OFF),
    PeerField("log_metrics", "SGLang", EITHER),
    PeerField("lora_path session_params custom_logit_processor custom_params rid sampling_seed stop_regex", "SGLang"),
    PeerField("bootstrap_host bootstrap_port bootstrap_room data_parallel_rank", "SGLang's router"),
    PeerField("repeat_penalty rep_pen encoder_repetition_penalty", "llama.cpp, KoboldCpp, text-generation-webui", (1,)),
    PeerField("repeat_last_n", "llama.cpp, mikupad", (-1,), part_of="repetition_penalty", warning=ALL_TOKENS),
    PeerField(
        "repetition_penalty_range", "text-generation-webui, mikupad", (0,), part_of="repetition_penalty", warning=ALL_TOKENS
    ),
    PeerField("penalize_nl", "llama.cpp, mikupad", ON, part_of="repetition_penalty", warning=ALL_TOKENS),
    PeerField("rep_pen_range rep_pen_slope", "KoboldCpp", part_of="rep_pen"),
    PeerField("typical_p tfs_z tfs typical", "llama.cpp, KoboldCpp, text-generation-webui, TGI", (1,)),
    PeerField(
        "top_a epsilon_cutoff eta_cutoff no_repeat_ngram_size penalty_alpha", "KoboldCpp, text-generation-webui", (0,)
    ),
    PeerField("top_n_sigma nsigma", "llama.cpp, KoboldCpp", (0, -1)),
    PeerField("mirostat mirostat_mode", "llama.cpp, text-generation-webui", (0,)),
    PeerField("mirostat_tau mirostat_eta", "llama.cpp, text-generation-webui", part_of="mirostat"),
    PeerField("dynatemp_range", "llama.cpp, KoboldCpp", (0,)),
    PeerField("dynamic_temperature", "text-generation-webui", OFF),
    PeerField("dynatemp_exponent", "llama.cpp, KoboldCpp", part_of="dynatemp_range"),
    PeerField("dynatemp_low dynatemp_high", "text-generation-webui", part_of="dynamic_temperature"),
    PeerField("temperature_last", "text-generation-webui", OFF, part_of="temperature"),
    PeerField("smoothing_factor", "KoboldCpp, text-generation-webui", (0,)),
    PeerField("smoothing_curve", "KoboldCpp, text-generation-webui", part_of="smoothing_factor"),
    PeerField("adaptive_target", "llama.cpp, KoboldCpp", (-1,)),
    PeerField("adaptive_decay", "llama.cpp, KoboldCpp", part_of="adaptive_target"),
    PeerField("xtc_probability", "llama.cpp, KoboldCpp, text-generation-webui", (0,)),
    PeerField("xtc_threshold", "llama.cpp, KoboldCpp, text-generation-webui", part_of="xtc_probability"),
    PeerField("dry_multiplier", "llama.cpp, KoboldCpp, text-generation-webui", (0,)),
    PeerField(
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers dry_range",
        "llama.cpp, KoboldCpp, text-generation-webui",
        part_of="dry_multiplier",
    ),
    PeerField("guidance_scale", "text-generation-webui, KoboldCpp", (1,)),
    PeerField("negative_prompt", "text-generation-webui, KoboldCpp", part_of="guidance_scale"),
    PeerField("do_sample add_bos_token", "text-generation-webui", ON),
    PeerField("ban_eos_token auto_max_new_tokens static_cache speculative_ngram", "text-generation-webui", OFF),
    PeerField("min_length max_tokens_second prompt_lookup_num_tokens", "text-generation-webui", (0,)),
    PeerField("custom_token_bans", "text-generation-webui", ("",)),
    PeerField("banned_tokens banned_strings images", "KoboldCpp", ([],)),
    PeerField("sampler_priority preset truncation_length instruction_template character", "text-generation-webui"),
    PeerField("mode", "text-generation-webui", ("instruct",)),
    PeerField("memory", "KoboldCpp", ("",)),
    PeerField("use_default_badwordsids bypass_eos render_special", "KoboldCpp", OFF),
    PeerField("trim_stop", "KoboldCpp", ON),
    PeerField("quiet", "KoboldCpp", EITHER),
    PeerField("sampler_seed", "KoboldCpp", (-1,)),
    PeerField("sampler_order genkey max_length max_context_length", "KoboldCpp"),
    PeerField("n_predict samplers", "llama.cpp"),
    PeerField("n_probs n_keep n_discard n_indent min_keep", "llama.cpp", (0,)),
    PeerField("t_max_prompt_ms t_max_predict_ms", "llama.cpp", (0, -1)),
    PeerField("id_slot", "llama.cpp", (-1,)),
    PeerField("lora response_fields image_data", "llama.cpp", ([],)),
    PeerField("timings_per_token return_progress return_tokens post_sampling_probs backend_sampling", "llama.cpp", OFF),
    PeerField("watermark details decoder_input_details return_full_text", "TGI", OFF),
    PeerField("adapter_id guideline tool_prompt top_n_tokens truncate", "TGI"),
    PeerField("drop_params", "LiteLLM", EITHER),
)


class Ineffective(NamedTuple):
    """A field of a body that has no effect."""

    name: str  # in an object inside the body it is named "stream_options.x"
    reason: str | None  # None: nobody knows it
    is_refused: bool = True


def by_name(*fields: PeerField) -> dict[str, PeerField]:
    return {name: field for field in fields for name in field.names.split()}


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # 1 == True, but they are different values here.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def ineffective(body: Mapping[str, Any], honoured: Mapping[str, Any], peers: Mapping[str, PeerField]) -> list[Ineffective]:
    """Which fields of `body` have no effect though they ask for one. `honoured` has the defaults of the fields that have."""

    def is_default(name: str) -> bool:
        value = body.get(name)
        return value is None or is_one_of(value, (honoured[name],) if name in honoured else peers[name].values)

    found = []
    for name in [name for name in body if name not in honoured]:
        field = peers.get(name)
        if field is None:
            found.append(Ineffective(name, None))
        elif not is_default(name) and not (field.part_of and is_default(field.part_of)):
            is_warned = field.warning is not None and type(body[name]) is type(field.values[0])
            reason = field.warning if is_warned else f"not supported by this server (accepted: {field.accepted})"
            found.append(Ineffective(name, reason, is_refused=not is_warned))
    return found
