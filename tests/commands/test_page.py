"""The page of a run: asked by Gradio's client, and in a real browser without any network."""

import gc
import json
import shutil
import signal
import time
import urllib.request
import warnings
from contextlib import suppress
from itertools import pairwise

import pytest

from corrsteer_pl.commands.page import Trial, page
from corrsteer_pl.commands.serve import listening
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.runs.loading import load_fit
from tests.processes import Command

gradio_client = pytest.importorskip("gradio_client")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    # Gradio's client leaves sockets and loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def shown(refusing):
    """The address of a page, with what it asks and the method of its run."""
    folder, module = refusing
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
    command = Command("page", folder, "--port", port, "--max_new_tokens=8", cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, command)
        yield address, module
    finally:
        command.send(signal.SIGTERM)
        command.wait()


def wait_for(address, command):
    for _ in range(600):
        assert command.is_running(), command.stderr[-3000:]
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing answers at {address}")


@pytest.fixture(scope="module")
def client(shown):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = gradio_client.Client(shown[0], verbose=False, analytics_enabled=False)
        yield client
        client.close()
        del client
        gc.collect()


def changed(module):
    return next(o for o in module.outcomes if o.answer_baseline != o.answer_steered)


def test_answers_come_in_pieces_and_end_as_in_the_test(client, shown):
    _, module = shown
    outcome = changed(module)
    job = client.submit(outcome.prompt, 1, *[1 for _ in module.selection.features], api_name="/ask")
    *_, (unsteered, steered, reward) = [job.result(), *job.outputs()]
    assert [unsteered, steered] == [outcome.answer_baseline, outcome.answer_steered]
    assert f"unsteered {100 * outcome.reward_baseline:.1f} %, steered {100 * outcome.reward_steered:.1f} %" in reward
    assert len(job.outputs()) > 3
    for before, after in pairwise(job.outputs()):
        assert after[1].startswith(before[1])


def test_what_cannot_be_answered_is_told(client, shown):
    each = [1] * len(shown[1].selection.features)
    with pytest.raises(gradio_client.exceptions.AppError, match="tokens, but demo reads at most"):
        client.predict("hen " * 5000, 1, *each, api_name="/ask")


def test_sliders_count(client, shown):
    _, module = shown
    outcome, count = changed(module), len(module.selection.features)
    for strength, each in ((0, [1] * count), (1, [0] * count)):
        unsteered, steered, _ = client.predict(outcome.prompt, strength, *each, api_name="/ask")
        assert unsteered == steered == outcome.answer_baseline
    typed = outcome.prompt.removeprefix("Request: ").removesuffix("\nResponse:")
    assert client.predict(typed, 1, *[1] * count, api_name="/ask")[:2] == (
        outcome.answer_baseline, outcome.answer_steered,
    )  # fmt: skip


def test_questions_are_of_a_test_that_asked_as_the_page_does(refusing, tmp_path):
    folder, module = tmp_path / "demo", refusing[1]
    shutil.copytree(refusing[0], folder)
    differing = {o.prompt for o in module.outcomes if o.answer_baseline != o.answer_steered}
    fit, metrics = load_fit(folder), folder / "test/demo_refusal/metrics.json"
    assert Trial(fit, 8).changed.keys() == differing
    told = json.loads(metrics.read_text(encoding="utf-8"))
    for other in ({"shots": 3}, {"restrict": True}, {"task": "demo_qa"}, {"scale": 2.0}, {"positions": "all"}):
        metrics.write_text(json.dumps({**told, **other}), encoding="utf-8")
        assert Trial(fit, 8).changed == {}, other


def test_any_free_port_will_do(refusing, tmp_path):
    command = Command("page", refusing[0], "--port", 0, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while "Ctrl-C ends it" not in command.stdout:
            assert command.is_running(), command.stderr[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        wait_for(command.stdout.partition(";")[0].strip(), command)
    finally:
        command.send(signal.SIGTERM)
        command.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_nothing_is_asked_of_other_machines(shown, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    address, module = shown
    outcome, elsewhere = changed(module), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1100, "height": 1000})
        tab.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address)
                  else (elsewhere.append(route.request.url), route.abort()))  # fmt: skip
        tab.goto(address)
        tab.locator("textarea").first.fill(outcome.prompt)
        tab.keyboard.press("Enter")
        expect(tab.locator("textarea").nth(2)).to_have_value(outcome.answer_steered, timeout=20_000)
        expect(tab.locator("textarea").nth(1)).to_have_value(outcome.answer_baseline)
        for feature in module.selection.features:
            expect(tab.get_by_text(f"{feature.site} / {feature.index}")).to_be_visible()
        tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        browser.close()
    assert elsewhere == []


def test_what_cannot_be_shown_is_one_sentence(tmp_path):
    taken = pytest.raises(UserError, match="cannot be listened on .* Choose another with --port")
    with listening("127.0.0.1", 0) as place, taken:
        page(tmp_path, place.getsockname()[1])
    with pytest.raises(UserError, match="--max_new_tokens is 0"):
        page(tmp_path, 0, 0)
