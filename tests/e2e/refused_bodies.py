"""Bodies that vLLM rejects, at least one for each place in its source that rejects. `model` is added to each."""

from typing import Any

Bodies = list[dict[str, Any]]

_MESSAGES = [{"role": "user", "content": "Say something."}]
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
_HUGE = 2**70


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _outputs(**constraints: Any) -> dict[str, Any]:
    return {"structured_outputs": constraints}


# Rejected alike with a prompt and with messages.
_GENERATION: Bodies = [
    {"cache_salt": ""},
    {"cache_salt": 7},
    {"cache_salt": "a/b"},
    {"cache_salt": "x" * 200},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "structural_tag"}},
    {"response_format": {"type": "structural_tag", "format": {"type": "no such"}}},
    {"response_format": {"type": "no such"}},
    {"stream_options": {"include_usage": True}},
    {"logprob_token_ids": [1], "use_beam_search": True},
    {"logprob_token_ids": [1]},
    {"prompt_logprobs": "x"},
    {"prompt_logprobs": 1, "stream": True},
    {"prompt_logprobs": -2},
    {"prompt_logprobs": 21},
    _outputs(json={}, regex="a"),
    _outputs(),
    _outputs(grammar='root ::= "a"', json_object=True),
    _outputs(structural_tag=""),
    _outputs(structural_tag="no JSON"),
    _outputs(structural_tag='{"a": ' + "[" * 600 + "]" * 600 + "}"),
    _outputs(choice=[]),
    _outputs(grammar=" "),
    _outputs(grammar="root ::= "),
    _outputs(grammar="no grammar"),
    _outputs(json=" "),
    _outputs(json="no JSON"),
    _outputs(json=_nested(300)),
    _outputs(json={"type": "no such"}),
    _outputs(json={"type": "object", "patternProperties": {"(": {"type": "string"}}}),
    _outputs(json_object=False),
    _outputs(regex="a\0"),
    _outputs(regex="("),
    {"thinking_token_budget": -2},
    {"thinking_token_budget": 1.5},
    {"repetition_detection": {"max_pattern_size": 1, "min_pattern_size": 2}},
    {"repetition_detection": {"max_pattern_size": 1, "min_count": 1}},
    {"n": 0},
    {"n": 20_000},
    {"n": 2, "temperature": 0},
    {"presence_penalty": 3},
    {"frequency_penalty": -3},
    {"repetition_penalty": 0},
    {"repetition_penalty": float("inf")},
    {"temperature": -1},
    {"temperature": 3},
    {"temperature": float("nan")},
    {"top_p": 0},
    {"top_p": float("nan")},
    {"top_k": -2},
    {"min_p": 2},
    {"min_tokens": -1},
    {"min_tokens": 9, "max_tokens": 3},
    {"stream_interval": 0},
    {"stop": [""]},
    {"stop": ["x"] * 2000},
    {"bad_words": [""]},
    {"bad_words": [" "]},
    {"bad_words": [f"word {number}" for number in range(3000)]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [10**6]},
    {"stop_token_ids": ["x"]},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"1000000": 1}},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [10**6]},
    {"vllm_xargs": {"a": _HUGE}},
    {"priority": 5},
    {"priority": _HUGE},
    {"seed": _HUGE},
    {"truncate_prompt_tokens": 100_000},
    {"truncate_prompt_tokens": -2},
    {"max_tokens": -1},
    {"model": "no such"},
    {"model": 7},
]

GENERATING: dict[str, Bodies] = {
    "/v1/chat/completions": [
        *({"messages": _MESSAGES, "max_tokens": 1, "temperature": 0} | body for body in _GENERATION),
        {},
        {"messages": "x"},
        {"messages": []},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "no such"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": _MESSAGES, "max_tokens": 0},
        {"messages": _MESSAGES, "max_completion_tokens": 10**6},
        {"messages": [{"role": "user", "content": "long " * 3000}]},
        {"messages": _MESSAGES, "logprobs": True, "logprob_token_ids": [1] * 200},
        {"messages": _MESSAGES, "logprobs": True, "logprob_token_ids": [10**6]},
        {"messages": _MESSAGES, "top_logprobs": "x"},
        {"messages": _MESSAGES, "top_logprobs": -2},
        {"messages": _MESSAGES, "top_logprobs": 1},
        {"messages": _MESSAGES, "logprobs": True, "top_logprobs": 21},
        {
            "messages": _MESSAGES,
            "tools": _TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            **_outputs(json={}),
        },
        {"messages": _MESSAGES, "tools": []},
        {"messages": _MESSAGES, "tools": [{"type": "no such"}]},
        {"messages": _MESSAGES, "tool_choice": "auto"},
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": "no such"},
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": {"type": "function"}},
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": {"type": "function", "function": {}}},
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": {"type": "function", "function": {"name": ""}}},
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"messages": _MESSAGES, "tools": [{}], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"messages": _MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        {"messages": _MESSAGES, "chat_template": "{{ messages }}"},
        {"messages": _MESSAGES, "chat_template_kwargs": {"chat_template": "x"}},
        {"messages": _MESSAGES, "mm_processor_kwargs": {"a": 1}},
        {"messages": _MESSAGES, "media_io_kwargs": {"image": {"a": 1}}},
        {"messages": _MESSAGES, "reasoning_effort": 7},
    ],
    "/v1/completions": [
        *({"prompt": "abc", "max_tokens": 1, "temperature": 0} | body for body in _GENERATION),
        {},
        {"prompt": ""},
        {"prompt": {"a": 1}},
        {"prompt": [10**6]},
        {"prompt": [-1]},
        {"prompt": ["a"] * 5000},
        {"prompt": "long " * 3000},
        {"prompt_embeds": ["AAAA"] * 5000},
        {"prompt_embeds": "AAAA"},
        {"prompt": "abc", "use_beam_search": True, "echo": True, "logprobs": 1},
        {"prompt": "abc", "logprob_token_ids": [1], "echo": True, "max_tokens": 0},
        {"prompt": "abc", "logprobs": "x"},
        {"prompt": "abc", "logprobs": -2},
        {"prompt": "abc", "logprobs": 21},
        {"prompt": "abc", "suffix": "x"},
    ],
    "/v1/responses": [
        {},
        {"input": 7},
        {"input": [{"type": "no such"}]},
        {"input": [{"role": "no such", "content": "x"}]},
        {"input": "abc", "cache_salt": ""},
        {"input": "abc", "background": True, "store": False},
        {"input": "abc", "background": True},
        {"input": "abc", "prompt": {"id": "x"}},
        {"input": "abc", "previous_response_id": "resp_none"},
        {"input": "abc", "previous_response_id": "none"},
        {"input": "abc", "tools": [{"type": "custom", "name": "c", "format": {"type": "grammar"}}]},
        {"input": "abc", "tool_choice": "required"},
        {"input": "abc", "tool_choice": {"type": "function", "name": "f"}},
        {"input": "abc", "tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function"}},
        {
            "input": "abc",
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": {"type": "function", "name": "g"},
        },
        {
            "input": "abc",
            "tools": [
                {"type": "namespace", "name": name, "tools": [{"type": "function", "name": "f"}]} for name in ("a", "b")
            ],
            "tool_choice": {"type": "function", "name": "f"},
        },
        {"input": "abc", "model": "no such"},
        {"input": "abc", "max_output_tokens": 0},
        {"input": "abc", "temperature": -1},
        {"input": "abc", "presence_penalty": 3},
        {"input": "abc", "structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}},
        {"input": "long " * 3000},
    ],
}

# Rejected alike with an input and with messages.
_POOLING: Bodies = [
    {"cache_salt": ""},
    {"cache_salt": "a/b"},
    {"truncate_prompt_tokens": 100_000},
    {"truncate_prompt_tokens": -2},
    {"priority": 5},
    {"priority": _HUGE},
    {"mm_processor_kwargs": {"a": 1}},
    {"encoding_format": "no such"},
    {"embed_dtype": "no such"},
    {"model": 7},
]
_CHAT_POOLING: Bodies = [
    {"cache_salt": ""},
    {"messages": _MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
    {"messages": _MESSAGES, "media_io_kwargs": {"image": {"a": 1}}},
    {"messages": "x"},
]
_SCORING: Bodies = [
    {"cache_salt": "a/b"},
    {"priority": 5},
    {"priority": _HUGE},
    {"truncate_prompt_tokens": 100_000},
    {"mm_processor_kwargs": {"a": 1}},
    {"model": 7},
]
_SCORE: Bodies = [
    *({"text_1": "a", "text_2": "b"} | body for body in _SCORING),
    {},
    {"text_1": "a"},
    {"text_1": [], "text_2": []},
    {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
    {"text_1": "a", "text_2": {"a": 1}},
    {"text_1": "a", "text_2": "long " * 3000},
]
_RERANK: Bodies = [
    *({"query": "a", "documents": ["b"]} | body for body in _SCORING),
    {},
    {"query": "a"},
    {"query": "a", "documents": []},
    {"query": "a", "documents": ["b"], "top_n": "x"},
    {"query": "a", "documents": ["long " * 3000]},
]

POOLING: dict[str, Bodies] = {
    "/v1/embeddings": [
        *({"input": "abc"} | body for body in _POOLING),
        *_CHAT_POOLING,
        {},
        {"input": "abc", "normalize": True},
        {"input": "abc", "task": "score"},
        {"input": "abc", "dimensions": 16},
        {"input": "abc", "dimensions": -1},
        {"input": []},
        {"input": [[]]},
        {"input": {"a": 1}},
        {"input": [10**6]},
        {"input": "long " * 3000},
    ],
    "/pooling": [
        *({"input": "abc"} | body for body in _POOLING),
        *_CHAT_POOLING,
        {},
        {"input": "abc", "normalize": True},
        {"input": "abc", "task": "encode"},
        {"input": "abc", "task": "no such"},
        {"input": "abc", "task": "classify"},
        {"input": "abc", "task": "token_embed"},
        {"input": "abc", "task": "plugin"},
        {"input": "abc", "dimensions": 16},
        {"data": {"a": 1}},
    ],
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
}

CLASSIFYING: dict[str, Bodies] = {
    "/classify": [
        *({"input": "abc"} | body for body in _SCORING),
        *_CHAT_POOLING,
        {},
        {"input": 7},
        {"input": ""},
        {"input": []},
        {"input": {"a": 1}},
        {"input": [[3, 10**6]]},
        {"input": [[3, -2]]},
        {"input": "abc", "use_activation": "no such"},
        {"input": "abc", "normalize": True},
        {"input": "abc", "task": "score"},
        {"input": "abc", "model": "no such"},
        {"input": "long " * 3000},
    ],
}

_FILE: Bodies = [
    {},
    {"file_url": 7},
    {"file_url": "data:,", "file": "x"},
    {"file_url": "data:,", "stream_include_usage": True},
    {"file_url": "data:,", "vllm_xargs": "no JSON"},
    {"file_url": "data:,", "response_format": "no such"},
]
AUDIO: dict[str, Bodies] = {"/v1/audio/transcriptions": _FILE, "/v1/audio/translations": _FILE}

_ARGS = "SamplingParams._verify_args: raise VLLMValidationError("
_LOGPROBS = "SamplingParams._validate_logprobs: raise VLLMValidationError("
_OUTPUTS = "SamplingParams._validate_structured_outputs: raise VLLMValidationError("
# Why no body reaches a place, and how the names of those places begin.
NO_BODY_FOR: dict[str, tuple[str, ...]] = {
    "no JSON is a ValueError": (
        "ChatCompletionRequest.check_structured_outputs_count: raise data",
        "ChatCompletionRequest.check_tool_usage: raise data",
    ),
    "another validator, or the type of the field, refuses it first": (
        "TranscriptionRequest.validate_transcription_request: raise HTTPException",
        "TranslationRequest.validate_stream_options: raise HTTPException",
        "_verify_num_sequences: raise VLLMValidationError(f'{parameter_name} must be an int",
        f"{_ARGS}f'top_k must be an integer",
        f"{_ARGS}f'stream_interval",
        f"{_ARGS}f'stop_token_ids",
        f"{_ARGS}f'logprobs",
        f"{_ARGS}f'prompt_logprobs",
        f"{_OUTPUTS}'structured_outputs.structural_tag",
    ),
    "what was JSON can be written as JSON": ("validate_structural_tag_response_format: ",),
    "no field of a request sets it": (
        f"{_ARGS}'stop strings",
        f"{_LOGPROBS}f'When both",
        f"{_LOGPROBS}f'Requested {{num_ids}}",
        f"{_LOGPROBS}'prompt_logprob_",
        f"{_LOGPROBS}f'prompt_logprob_token",
        "SamplingParams._validate_trace_replay: ",
        f'{_OUTPUTS}f"Request-level',
    ),
    "text has no tokens that its tokenizer does not know": (
        "SamplingParams.update_from_tokenizer: raise VLLMValidationError(f'The model vocabulary",
    ),
    "it is about other models, tokenizers and flags than the test has": (
        "SamplingParams._validate_spec_decode: ",
        "SamplingParams._validate_diffusion: ",
        f"{_OUTPUTS}'Structured outputs are not",
        f'{_OUTPUTS}"Structured outputs requires',
        f'{_OUTPUTS}"Non-tekken',
        f"{_OUTPUTS}\"The 'guidance'",
        f'{_OUTPUTS}"Mistral',
        f"{_OUTPUTS}'No compatible",
    ),
}
