"""Whatever a request to the endpoint contains is read, or rejected by name; asked by the official client."""

import json

import pytest

from corrsteer_pl.methods.runs.loading import load_fit
from tests.commands import conftest
from tests.commands.test_serve import running

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

INTERFACES = ("chat/completions", "completions", "responses")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


refusing = conftest.refusing


@pytest.fixture(scope="module")
def fit(refusing):
    fit = load_fit(refusing[0])
    fit.method.llm.tokenizer.chat_template = TEMPLATE
    yield fit
    fit.method.llm.tokenizer.chat_template = None


@pytest.fixture(scope="module")
def client(fit):
    with running(fit) as make:
        yield make("any")


@pytest.fixture(scope="module")
def outcome(refusing):
    return next(o for o in refusing[1].outcomes if o.answer_baseline != o.answer_steered)


def request(interface, written="A hen", /, **fields):
    asked = {
        "chat/completions": {"messages": [{"role": "user", "content": written}]},
        "completions": {"prompt": written},
        "responses": {"input": written},
    }
    return {"model": "village", **asked[interface], **fields}


def post(client, interface, body):
    with httpx.Client() as plain:
        return plain.post(f"{client.base_url}{interface}", json=body, timeout=60)


def rejected(client, interface, body):
    """The message of a request that is rejected in the one shape of errors."""
    answer = post(client, interface, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error["message"]


def text_of(answer):
    found = answer.json()
    if "output" in found:
        return found["output"][0]["content"][0]["text"]
    choice = found["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


UNSUPPORTED = [
    ("response_format", {"type": "json_object"}, INTERFACES[:1]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}], INTERFACES),
    ("tool_choice", "required", INTERFACES),
    ("functions", [{"name": "f"}], INTERFACES[:1]),
    ("function_call", {"name": "f"}, INTERFACES[:1]),
    ("frequency_penalty", 0.5, INTERFACES),
    ("presence_penalty", -1, INTERFACES),
    ("logit_bias", {"5": 10}, INTERFACES),
    ("logprobs", True, INTERFACES),
    ("top_logprobs", 3, INTERFACES),
    ("n", 2, INTERFACES),
    ("best_of", 3, INTERFACES[1:2]),
    ("echo", True, INTERFACES[1:2]),
    ("suffix", " end", INTERFACES[1:2]),
    ("reasoning_effort", "low", INTERFACES),
    ("reasoning", {"effort": "low"}, INTERFACES[2:]),
    ("previous_response_id", "resp_1", INTERFACES[2:]),
    ("conversation", "conv_1", INTERFACES[2:]),
    ("prompt", {"id": "pmpt_1"}, INTERFACES[2:]),
    ("text", {"format": {"type": "json_schema"}}, INTERFACES[2:]),
    ("truncation", "auto", INTERFACES[2:]),
    ("background", True, INTERFACES[2:]),
    ("include", ["message.output_text.logprobs"], INTERFACES[2:]),
    ("modalities", ["text", "audio"], INTERFACES[:1]),
    ("audio", {"voice": "alloy", "format": "wav"}, INTERFACES[:1]),
    ("prediction", {"type": "content", "content": "x"}, INTERFACES[:1]),
    ("store", True, INTERFACES[:1]),
    ("web_search_options", {}, INTERFACES[:1]),
    ("top_k", 5, INTERFACES),
    ("guided_json", {"type": "object"}, INTERFACES),
    ("stream", "false", INTERFACES),
    ("stream_options", {"other": True}, INTERFACES),
    ("generation_config", "{", INTERFACES),
    ("generation_config", {"top_k": 3}, INTERFACES),
    ("chat_template_kwargs", [1], INTERFACES[:1]),
    ("stop", "x", INTERFACES[2:]),
    ("messages", [{"role": "user", "content": "x"}], INTERFACES[1:]),
]


@pytest.mark.parametrize(
    ("field", "value", "interface"), [(name, value, each) for name, value, where in UNSUPPORTED for each in where]
)
def test_fields_that_are_not_supported_are_rejected_by_name(client, field, value, interface):
    assert rejected(client, interface, request(interface, **{field: value})).startswith(field)


DEFAULTS = {
    "chat/completions": {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0,
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "functions": None, "stop": None,
        "modalities": ["text"], "store": False, "service_tier": "auto", "user": "me", "metadata": {"a": "b"},
        "reasoning_effort": None, "parallel_tool_calls": True, "seed": 3, "unknown": None, "stream": None,
    },
    "completions": {
        "n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "frequency_penalty": 0, "logit_bias": {},
        "presence_penalty": 0, "stop": [], "user": "me", "stream": False,
    },
    "responses": {
        "previous_response_id": None, "tools": [], "tool_choice": "none", "store": True, "truncation": "disabled",
        "text": {"format": {"type": "text"}}, "include": [], "background": False, "reasoning": {}, "metadata": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("interface", INTERFACES)
def test_default_values_change_nothing(client, outcome, interface):
    limit = {"responses": "max_output_tokens"}.get(interface, "max_tokens")
    answer = post(client, interface, request(interface, outcome.prompt, **{limit: 8}, **DEFAULTS[interface]))
    assert answer.status_code == 200, answer.text
    assert text_of(answer) == outcome.answer_baseline


# What a message holds, and what the error names.
CONTENTS = [
    (None, "content is null"),
    ([], r"content is \[\]"),
    (5, "content is 5"),
    ({"text": "x"}, 'content is {"text": "x"}'),
    ([IMAGE], "image_url"),
    ([{"type": "text", "text": "x"}, IMAGE], "image_url"),
    ([{"type": "input_image", "image_url": "x"}], "input_image"),
    ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "input_audio"),
    ([{"type": "file", "file": {"file_id": "f"}}], "file"),
    ([{"type": "refusal", "refusal": "no"}], "refusal"),
    ([{"type": "other"}], "other"),
    (["x"], '"x"'),
    ([{"type": "text"}], "text is null"),
    ([{"type": "text", "text": 5}], "text is 5"),
    ([{"text": "x"}], "content.0. is null"),
]


@pytest.mark.parametrize(("content", "part"), CONTENTS)
@pytest.mark.parametrize("interface", [INTERFACES[0], INTERFACES[2]])
def test_content_that_is_not_text_is_rejected_by_name(client, content, part, interface):
    message = {"role": "user", "content": content}
    field = "messages" if interface == "chat/completions" else "input"
    for messages in ([message], [{"role": "user", "content": "A hen"}, message]):
        found = rejected(client, interface, {"model": "village", field: messages})
        assert part.replace("\\", "").replace(".0.", "[0]") in found
        assert f"{field}[{len(messages) - 1}]" in found


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": "user"}, "content is null"),
        ({"role": "tool", "tool_call_id": "1", "content": "x"}, 'role is "tool"'),
        ({"content": "x"}, "role is null"),
        ({"role": 5, "content": "x"}, "role is 5"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ("x", 'messages[0] is "x"'),
    ],
)
def test_messages_that_are_not_text_are_rejected_by_name(client, message, part):
    assert part in rejected(client, "chat/completions", {"model": "village", "messages": [message]})


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([{"type": "input_image", "image_url": "x"}], "input_image"),
        ([{"type": "input_text", "text": "x"}, {"type": "input_file", "file_id": "x"}], "input_file"),
        ([{"type": "function_call_output", "call_id": "1", "output": "x"}], "function_call_output"),
        ([{"role": "user", "content": "x"}, {"type": "reasoning", "content": []}], "reasoning"),
        ("", "no input"),
        ([], "no input"),
        (5, "input is 5"),
        (None, "no input"),
    ],
)
def test_items_of_the_newer_interface_that_are_not_text_are_rejected_by_name(client, value, part):
    assert part in rejected(client, "responses", {"model": "village", "input": value})


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        (["a", "b"], "prompt"),
        ([1, 2], "prompt"),
        ([[1, 2]], "prompt"),
        ([5], "prompt"),
        ({}, "prompt"),
        ([], "no prompt"),
    ],
)
def test_prompts_that_are_not_one_text_are_rejected(client, prompt, part):
    assert part in rejected(client, "completions", {"model": "village", "prompt": prompt})


def test_a_list_with_one_prompt_and_parts_of_text_are_read(client, outcome):
    asked = {"model": "village-steered", "max_tokens": 8}
    found = client.completions.create(prompt=[outcome.prompt], **asked)
    assert found.choices[0].text == outcome.answer_steered
    parts = [{"type": "text", "text": outcome.prompt}]
    # As the client sends an assistant's message again: with fields that are null.
    found = client.chat.completions.create(
        messages=[{"role": "user", "content": parts, "name": "me", "tool_calls": None}], **asked
    )
    assert found.choices[0].message.content == outcome.answer_steered
    parts = [{"type": "input_text", "text": outcome.prompt}]
    for value in (parts, [{"role": "user", "content": parts}], [{"type": "message", "role": "user", "content": parts}]):
        found = client.responses.create(model="village-steered", input=value, max_output_tokens=8)
        assert found.output_text == outcome.answer_steered


def test_empty_tool_calls_do_not_hide_a_message(client, outcome):
    messages = [{"role": "assistant", "content": outcome.prompt, "tool_calls": []}]
    found = client.chat.completions.create(model="village", messages=messages, max_tokens=8)
    assert found.choices[0].message.content == outcome.answer_baseline


def test_instructions_do_not_replace_a_system_message(client, fit):
    messages = [{"role": "system", "content": "One. "}, {"role": "user", "content": "Two."}]
    found = client.responses.create(model="village", instructions="Zero. ", input=messages, max_output_tokens=1)
    assert found.usage.input_tokens == len(fit.method.llm.token_ids("Zero. One. Two."))


def test_bos_that_a_prompt_brings_is_not_repeated(client, fit, outcome):
    found = client.completions.create(model="village", prompt=f"<s>{outcome.prompt}", max_tokens=8)
    assert found.choices[0].text == outcome.answer_baseline
    assert found.usage.prompt_tokens == len(fit.method.llm.token_ids(outcome.prompt))


# ---------------------------------------------------------------- how an answer ends


@pytest.fixture(scope="module")
def length(fit, outcome):
    """Tokens that Hugging Face generates for the prompt, EOS with them."""
    import torch

    llm = fit.method.llm
    ids = torch.tensor([llm.token_ids(outcome.prompt)])
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    row = llm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    assert row[-1] in llm.eos_token_ids
    assert 2 < len(row) < 60
    return len(row)


def ending(client, interface, prompt, limit, stream, **fields):
    """Finish reason, and number of tokens."""
    asked = {"model": "village", "stream": stream, **fields}
    if interface == "responses":
        found = client.responses.create(input=prompt, max_output_tokens=limit, **asked)
        last = list(found)[-1] if stream else None
        assert last is None or last.type == f"response.{last.response.status}"
        response = last.response if stream else found
        reason = response.incomplete_details and response.incomplete_details.reason
        known = {("completed", None): "stop", ("incomplete", "max_output_tokens"): "length"}
        return known[response.status, reason], response.usage.output_tokens
    if interface == "completions":
        found = client.completions.create(prompt=prompt, max_tokens=limit, **asked)
    else:
        messages = [{"role": "user", "content": prompt}]
        found = client.chat.completions.create(messages=messages, max_tokens=limit, **asked)
    last = list(found)[-1] if stream else found
    return last.choices[0].finish_reason, last.usage.completion_tokens


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_by_its_length_only_if_the_model_would_go_on(client, outcome, length, interface, stream):
    def ends(limit):
        return ending(client, interface, outcome.prompt, limit, stream)

    assert ends(length + 5) == ("stop", length)
    # EOS is the last token that is allowed.
    assert ends(length) == ("stop", length)
    assert ends(length - 1) == ("length", length - 1)
    assert ends(1) == ("length", 1)


@pytest.mark.parametrize("interface", INTERFACES[:2])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_by_a_stop_text(client, outcome, length, interface, stream):
    stop = outcome.answer_baseline.strip()[:3]
    reason, count = ending(client, interface, outcome.prompt, length - 1, stream, stop=[stop])
    assert reason == "stop"
    assert count < length
    # The token that completes it is the last one that is allowed.
    assert ending(client, interface, outcome.prompt, count, stream, stop=stop) == ("stop", count)


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_stream_ends_with_its_mark(client, interface):
    lines = post(client, interface, request(interface, stream=True)).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert sum(line == "data: [DONE]" for line in lines) == 1
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_prompt_that_is_too_long_is_rejected_before_a_stream_begins(client, interface):
    assert "tokens, but the model reads at most" in rejected(
        client, interface, request(interface, "hen " * 5000, stream=True)
    )


@pytest.mark.parametrize("interface", INTERFACES)
def test_an_error_within_a_stream_is_raised_by_the_client(client, fit, interface, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError('it "broke"')

    monkeypatch.setattr(fit.method.llm.model, "generate", fail)
    with pytest.raises(openai.APIError, match='it "broke"'):
        ending(client, interface, "A hen", 5, stream=True)
    lines = post(client, interface, request(interface, stream=True)).text.strip().split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert lines[-1] == "data: [DONE]"
    answer = post(client, interface, request(interface))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == 'it "broke"'
