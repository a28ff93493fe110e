"""A local page: both models write side by side, with sliders for how strongly, and for what, the run steers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from corrsteer_pl.commands.chat import NAMES
from corrsteer_pl.commands.serve import listening
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.paired import Outcome
from corrsteer_pl.evaluation.tables import percent, show
from corrsteer_pl.methods.answers.streams import stream
from corrsteer_pl.methods.runs.loading import Fit, load_fit
from corrsteer_pl.tasks import Example, rewards_of

# How far sliders go, in units of what the run steers with.
STRONGEST = 3.0
# Characters of a question in the list.
SHOWN = 100


def page(run: Path, port: int = 7860, max_new_tokens: int = 128) -> None:
    """Show a run as a page on this machine: http://127.0.0.1:PORT; nothing of it leaves the machine.

    Args:
        run: Folder of a run, such as checkpoints/demo, or a checkpoint.
        port: Port to listen on.
        max_new_tokens: How many tokens an answer has at most.
    """
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio, of the extra 'web': pip install 'corrsteer_pl[web]'.")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}; it is a number of tokens, at least 1.")
    with listening("127.0.0.1", port) as place:
        port = place.getsockname()[1]
    blocks = build(Trial(load_fit(run), max_new_tokens))
    show(f"http://127.0.0.1:{port}; Ctrl-C ends it.")
    launch(blocks, port)


class Trial:
    """What the page asks of a run.

    Args:
        fit: The run.
        max_new_tokens: How many tokens an answer has at most.
    """

    def __init__(self, fit: Fit, max_new_tokens: int) -> None:
        self.fit, self.max_new_tokens = fit, max_new_tokens
        self.cards = {card["name"]: card for card in getattr(fit.method, "cards", [])}

    @cached_property
    def changed(self) -> dict[str, Outcome]:
        """Questions of a test whose answers differ, by their prompts, where the test asked as the page does."""
        test = self.fit.asked_alike()
        return {o.prompt: o for o in (test.outcomes if test else []) if o.answer_baseline != o.answer_steered}

    def ask(self, text: str, strength: float, *each: float) -> Iterator[tuple[str, str, str]]:
        """Both answers as they are written, and in the end their rewards, where the task can say.

        Args:
            text: A question, or a prompt of the test.
            strength: Factor on all that steers.
            *each: Factors on each feature.
        """
        prompt = text if text in self.changed else self.fit.asked(text)
        ids = self.fit.prompt_ids([prompt])
        answers = ["", ""]
        for answers in stream(self.fit.method.llm, [ids, ids], self.fit.scaled(strength, each), self.max_new_tokens):
            yield answers[0], answers[1], ""
        yield answers[0], answers[1], self.judged(text, answers)

    def judged(self, text: str, answers: Sequence[str]) -> str:
        """The rewards of both answers to a question of the test; empty where nothing can be said."""
        outcome, task = self.changed.get(text), self.fit.task
        if outcome is None or task is None:
            return ""
        example = Example(outcome.id, outcome.prompt, outcome.gold, outcome.groups)
        with suppress(UserError):
            rewards = rewards_of(task, answers, [example, example])
            said = ", ".join(f"{name} {percent(reward)} %" for name, reward in zip(NAMES, rewards, strict=True))
            return f"Reward: {said}. Right: {outcome.gold}."
        return ""

    def described(self, feature: Any) -> str:
        """A feature in Markdown: where it is, what it makes likelier, and where more is known of it."""
        card = self.cards.get(feature.name, {})
        said = [f"**{feature.site} / {feature.index}**, coefficient {feature.coefficient:+.2f}"]
        if tokens := card.get("likelier", [])[:6]:
            said.append("makes likelier: " + " ".join(f"`{token.strip() or '␣'}`" for token in tokens))
        if feature.neuronpedia:
            said.append(f"[Neuronpedia]({feature.neuronpedia})")
        return "; ".join(said)


def build(trial: Trial) -> Any:
    """The page, not yet shown."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    fit = trial.fit
    with gr.Blocks(title=f"{fit.name}: steered and unsteered", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {fit.name}\n{fit.method.llm.name}, method {fit.method.name}")
        if trial.changed:
            choices = [(f"{' '.join(prompt.split())[-SHOWN:]}", prompt) for prompt in trial.changed]
            picked = gr.Dropdown(choices, value=None, label="Questions of the test whose answers changed")
        # With one line to begin with, Enter asks.
        text = gr.Textbox(label="Question", lines=1, max_lines=12, submit_btn="Ask")
        with gr.Row():
            answers = [gr.Textbox(label=name, lines=8, interactive=False) for name in NAMES]
        reward = gr.Markdown()
        strength = gr.Slider(
            0, STRONGEST, value=1, step=0.05, label="Strength", visible=bool(fit.features),
            info="1 is what the run steers with; 0 steers nothing",
        )  # fmt: skip
        each = []
        for feature in fit.features:
            with gr.Row():
                gr.Markdown(trial.described(feature))
                each.append(gr.Slider(0, STRONGEST, value=1, step=0.05, label=feature.name, show_label=False))

        def ask(*given: Any) -> Iterator[tuple[str, str, str]]:
            try:
                if str(given[0]).strip():
                    yield from trial.ask(*given)
            except UserError as error:
                raise gr.Error(str(error)) from error

        text.submit(ask, [text, strength, *each], [*answers, reward], api_name="ask")
        if trial.changed:
            picked.input(lambda prompt: prompt, picked, text, api_visibility="private")
    return blocks


def launch(blocks: Any, port: int, **options: Any) -> Any:
    """Show a page on this machine alone, with fonts that it has."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return blocks.queue().launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, theme=theme, footer_links=[], **options
    )
