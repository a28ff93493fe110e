"""The endpoint, asked by the official client: two models, streams, and requests at the same time."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from corrsteer_pl.commands.serve import listening, serve
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.runs.loading import load_fit
from tests.processes import Command

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from corrsteer_pl.commands.endpoint import application


@contextmanager
def running(fit, api_key=None):
    """The client of a server that runs in a thread."""
    with listening("127.0.0.1", 0) as place:
        server = uvicorn.Server(uvicorn.Config(application(fit, "village", api_key), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        address = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        # What comes last ends first: clients, whose connections would else be left to the garbage collector.
        with ExitStack() as ends:
            ends.callback(thread.join)
            ends.callback(setattr, server, "should_exit", True)
            yield lambda key: ends.enter_context(openai.OpenAI(base_url=address, api_key=key, max_retries=0))


@pytest.fixture(scope="module")
def fitted(refusing):
    folder, module = refusing
    return load_fit(folder), module


@pytest.fixture(scope="module")
def client(fitted):
    with running(fitted[0]) as make:
        yield make("any")


def text(client, model, prompt, stream=False):
    found = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0, stream=stream)
    parts = list(found) if stream else [found]
    assert {part.model for part in parts} == {model}
    return "".join(part.choices[0].text for part in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_both_models_answer_as_in_the_test(client, fitted, stream):
    assert [model.id for model in client.models.list()] == ["village", "village-steered"]
    changed = [o for o in fitted[1].outcomes if o.answer_baseline != o.answer_steered][:3]
    assert changed
    for outcome in changed:
        assert text(client, "village", outcome.prompt, stream) == outcome.answer_baseline
        assert text(client, "village-steered", outcome.prompt, stream) == outcome.answer_steered


def test_requests_at_the_same_time_never_mix_strengths(client, fitted):
    changed = [o for o in fitted[1].outcomes if o.answer_baseline != o.answer_steered][:4]
    asked = [(model, o) for o in changed for model in ("village", "village-steered")] * 3
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda pair: text(client, pair[0], pair[1].prompt), asked))
    wanted = [o.answer_baseline if model == "village" else o.answer_steered for model, o in asked]
    assert texts == wanted


def test_other_models_and_chats_without_a_template_are_refused(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there are village and village-steered"):
        text(client, "gpt", "Hello")
    with pytest.raises(openai.BadRequestError, match="village has no chat template"):
        client.chat.completions.create(model="village", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it is a number of tokens, at least 1"),
        ({"temperature": -1}, "temperature is -1; it is a number, at least 0"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"top_p": 5}, "top_p is 5; it is a number above 0, at most 1"),
        ({"stop": 5}, "stop is 5; it is a text, or a list of texts, none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"temperature": 1e-300}, "it is 0, for the likeliest token, or at least 0.001"),
        ({"seed": "x"}, "seed is 'x'; it is a whole number"),
        ({"frequency_penalty": "x"}, "the request cannot be answered"),
        ({"n": 2}, "n is 2, but a request has one answer"),
        ({"logprobs": 1}, "logprobs cannot be had here"),
        ({"prompt": ""}, "there is no prompt"),
        ({"prompt": "hen " * 5000}, "tokens, but the model reads at most"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told(client, options, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.completions.create(**{"model": "village", "prompt": "A hen", **options})


def test_a_temperature_samples_and_none_is_greedy(client):
    asked = {"model": "village", "prompt": "A hen", "max_tokens": 8, "stop": []}
    drawn = {client.completions.create(**asked, temperature=5).choices[0].text for _ in range(4)}
    assert len(drawn) > 1
    assert len({client.completions.create(**asked).choices[0].text for _ in range(2)}) == 1


def test_a_seed_counts_whatever_else_is_asked_at_the_same_time(client):
    def drawn(_):
        asked = {"prompt": "A hen", "max_tokens": 8, "temperature": 5, "seed": 3}
        return client.completions.create(model="village-steered", **asked).choices[0].text

    alone = drawn(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(drawn, range(16))) == {alone}


def test_a_models_own_sampling_and_penalties_are_left_out(client, fitted, monkeypatch):
    settings, outcome = fitted[0].method.llm.model.generation_config, fitted[1].outcomes[0]
    monkeypatch.setattr(settings, "do_sample", True)
    monkeypatch.setattr(settings, "temperature", 5.0)
    monkeypatch.setattr(settings, "repetition_penalty", 9.0)
    found = client.completions.create(model="village", prompt=outcome.prompt, max_tokens=8)
    assert found.choices[0].text == outcome.answer_baseline


def test_an_answer_ends_where_the_models_context_does(client, fitted):
    llm = fitted[0].method.llm
    prompt = "hen " * (llm.context - 8)
    length = len(llm.token_ids(prompt))
    assert length < llm.context
    found = client.completions.create(model="village", prompt=prompt, max_tokens=200, temperature=0)
    assert found.usage.completion_tokens <= llm.context + 1 - length


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [("load_model", 404, "Not Found"), ("v1/audio/transcriptions", 404, "Not Found"), ("v1/completions", 400, "JSON")],
)
def test_what_is_no_request_is_told_as_all_else(client, path, status, sentence):
    import httpx

    with httpx.Client() as plain:
        found = plain.post(str(client.base_url).replace("v1/", path), content="[")
    assert found.status_code == status
    assert sentence in found.json()["error"]["message"]


def test_models_of_no_name_are_refused(client):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model=["village"], prompt="A hen")


def test_the_server_ends_on_an_interrupt_without_a_word(fitted, tmp_path):
    command = Command("serve", fitted[0].folder, "--port", 0, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while "Ctrl-C ends it" not in command.stdout:
        assert command.is_running(), command.stderr
        assert time.monotonic() < deadline
        time.sleep(0.1)
    command.send(signal.SIGINT)
    assert command.wait(30) == [0]
    assert "Traceback" not in command.stderr


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_with_a_chat_template_conversations_are_answered_as_in_a_test(bos, fitted):
    fit, module = fitted
    tokenizer = fit.method.llm.tokenizer
    outcome = next(o for o in module.outcomes if o.answer_baseline != o.answer_steered)
    tokenizer.chat_template = f"{bos}{{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}"
    try:
        with running(fit) as make:
            messages = [{"role": "user", "content": outcome.prompt}]
            for model, answer in (("village", outcome.answer_baseline), ("village-steered", outcome.answer_steered)):
                found = make("any").chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
                assert found.choices[0].message.content.strip() == answer.strip()
                assert found.usage.prompt_tokens == len(fit.method.llm.prompt_ids([outcome.prompt], chat=True))
                newer = make("any").responses.create(
                    model=model, input=outcome.prompt, max_output_tokens=8, temperature=0
                )
                assert newer.output_text.strip() == answer.strip()
            with pytest.raises(openai.BadRequestError, match="there are no messages"):
                make("any").chat.completions.create(model="village", messages=[])
    finally:
        tokenizer.chat_template = None


def test_a_key_is_asked_for(fitted):
    with running(fitted[0], "secret") as make:
        assert len(list(make("secret").models.list())) == 2
        with pytest.raises(openai.AuthenticationError, match="the key is wrong or missing"):
            make("wrong").models.list()


def test_what_cannot_be_listened_on_is_one_sentence(tmp_path):
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 cannot be listened on .* Choose another"):
            serve(tmp_path, port)
    with pytest.raises(UserError, match=r"--host 0.0.0.0 is reached by other machines, so give a key"):
        serve(tmp_path, host="0.0.0.0")
    with pytest.raises(UserError, match="--api_key has a character that no client can send"):
        serve(tmp_path, api_key="clé")
    with pytest.raises(UserError, match="--port is 99999; it is a number from 0"):
        serve(tmp_path, 99999)
    with pytest.raises(UserError, match="is no run"):
        serve(tmp_path, 0)
