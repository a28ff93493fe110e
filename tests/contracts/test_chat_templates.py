"""The model reads every message that was passed in: the contract of rendered chat templates."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corrsteer_pl import TaskDataModule
from corrsteer_pl.cli.program import main
from corrsteer_pl.data.module import _check_distinct
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.prompting import Prompting
from tests.conftest import make_trainer

DEMO = Path(__file__).parents[2] / "corrsteer_pl/demo/assets/model"
SMALL = {"train_size": 24, "val_size": 8, "test_size": 8, "batch_size": 8}
ASSISTANT = "{% if add_generation_prompt %}[assistant]{% endif %}"
ALL = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}" + ASSISTANT
# Templates that render no text of a message if its content is a string.
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
PARTS += "{% endfor %}{{ '\n' }}{% endfor %}" + ASSISTANT
FIRST_PART = "{% for m in messages %}[{{ m.role }}]{{ m.content[0]['text'] }}\n{% endfor %}" + ASSISTANT
USER_PARTS = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{{ m.content[0]['text'] }}{% else %}"
USER_PARTS += "{{ m.content + '' }}{% endif %}{{ '\n' }}{% endfor %}" + ASSISTANT
# Templates that change no word.
TRIMMED = ALL.replace("m.content }}", "m.content | trim }}")
FOLDED = "{% set s = messages[0].content + '\n' if messages[0].role == 'system' else '' %}{% for m in messages %}"
FOLDED += "{% if m.role != 'system' %}[{{ m.role }}]{{ (s if loop.last else '') + m.content }}\n{% endif %}{% endfor %}"
NO_REASONING = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}\n{% endfor %}"

TURNS = ["Who are you?", "A", "Who am I?"]
SYSTEM = "Be brief."


def with_template(llm, template):
    changed = copy.copy(llm)
    changed.tokenizer, changed.message_parts = copy.deepcopy(llm.tokenizer), {}
    changed.tokenizer.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}" + ASSISTANT, "system"),
        ("[user]" + ASSISTANT, "system"),
        (ALL.replace("messages %}", "messages if m.role != 'system' %}"), "system"),
        (ALL.replace("messages %}", "messages if m.role != 'user' %}"), "user"),
        (ALL.replace("messages %}", "messages if m.role != 'assistant' %}"), "assistant"),
        ("[system]{{ messages[0].content }}[user]{{ messages[-1].content }}" + ASSISTANT, "user"),
        ("{{ messages[0].content }}{{ messages[1].content }}", "assistant"),
        (ALL.replace("in messages", "in messages | reverse"), "assistant"),
        (ALL.replace("m.content }}", "m.content[:4] }}"), "system"),
        (ALL.replace("m.content }}", "m.content | lower }}"), "system"),
        (ALL.replace("m.content", "m.text"), "system"),
        (ALL.replace("m.content }}", "m.content | length }}"), "system"),
    ],
)
def test_a_template_that_loses_a_message_is_rejected_by_role(llm, template, role):
    with pytest.raises(UserError, match=f"the {role} message .*data.chat_template"):
        with_template(llm, template).prompt_ids(TURNS, chat=True, system=SYSTEM)


def test_an_escaped_or_shortened_question_is_rejected(llm):
    escaping = with_template(llm, ALL.replace("m.content }}", "m.content | e }}"))
    assert escaping.prompt_text(["Who?"], chat=True) == "[user]Who?\n[assistant]"
    with pytest.raises(UserError, match="changes the user message"):
        escaping.prompt_text(["Is 1 < 2?"], chat=True)
    quoting = with_template(llm, ALL.replace("m.content }}", "m.content | tojson }}"))
    with pytest.raises(UserError, match="changes the user message"):
        quoting.prompt_text(["Who?\nYou."], chat=True)
    short = with_template(llm, ALL.replace("m.content }}", "m.content[:40] }}"))
    with pytest.raises(UserError, match="changes the user message .*'Who Who"):
        short.prompt_text(["Who " * 20], chat=True)


@pytest.mark.parametrize("template", [ALL, TRIMMED, PARTS, FIRST_PART, USER_PARTS])
def test_string_content_and_text_parts_are_rendered_alike(llm, template):
    text = with_template(llm, template).prompt_text(TURNS, chat=True, system=SYSTEM)
    assert text == "[system]Be brief.\n[user]Who are you?\n[assistant]A\n[user]Who am I?\n[assistant]"


def test_white_space_folded_system_messages_and_reasoning_are_no_loss(llm):
    trimmed = with_template(llm, TRIMMED).prompt_text(["  Who?\n"], chat=True)
    assert trimmed == "[user]Who?\n[assistant]"
    folded = with_template(llm, FOLDED).prompt_text(TURNS, chat=True, system=SYSTEM)
    assert folded == "[user]Who are you?\n[assistant]A\n[user]Be brief.\nWho am I?\n"
    reasoned = ["Who?", "<think>Hm.</think>\n\nMe.", "Why?"]
    assert "Hm" not in with_template(llm, NO_REASONING).prompt_text(reasoned, chat=True)
    # There is nothing to lose in an empty message.
    assert with_template(llm, ALL.replace("messages %}", "messages if m.content %}")).prompt_text(["Who?"], True, "")


def save_model(folder, template):
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return str(folder)


def test_the_commands_reject_such_a_model_and_write_nothing(tmp_path, capsys, monkeypatch):
    silent = save_model(tmp_path / "silent", "{% for m in messages %}[{{ m.role }}]{% endfor %}")
    monkeypatch.chdir(tmp_path)
    for command in ("doctor", "fit"):
        options = ["--config", "demo.yaml", "--model.llm", silent, "--trainer.default_root_dir", "run"]
        assert main([command, *options]) == 2
        assert "drops the user message" in " ".join(capsys.readouterr().err.split())
    assert not [path for path in Path("run").rglob("*") if path.is_file()]


def test_prompting_needs_a_template_that_renders_the_system_message(tmp_path):
    model = save_model(tmp_path / "model", ALL.replace("messages %}", "messages if m.role != 'system' %}"))
    with pytest.raises(UserError, match="drops the system message"):
        make_trainer().fit(Prompting(model, system_message=SYSTEM), datamodule=TaskDataModule(**SMALL))
    with pytest.raises(UserError, match="drops the system message"):
        make_trainer().fit(Prompting(model, examples=1), datamodule=TaskDataModule(**SMALL, system_prompt=SYSTEM))


def test_different_questions_need_different_tokens(tmp_path, llm):
    built = Tokenizer(models.WordLevel({"<unk>": 0, "Who": 1, "is": 2}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    few_words = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")
    data = TaskDataModule("generic", path=str(tmp_path), task_args={"prompt": "{q}", "gold": "yes"})
    for split, count in (("train", 6), ("validation", 2), ("test", 2)):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"q": f"Who is {split}{i}?"} for i in range(count)])
    data.setup("fit")
    first, second = data.examples["train"][:2]
    with pytest.raises(UserError, match=f"{first.id} and {second.id} differ"):
        _check_distinct([(e, few_words(e.prompt)["input_ids"]) for e in data.examples["train"]], "m")
    _check_distinct([(e, llm.token_ids(e.prompt)) for e in data.examples["train"]], "m")
    # A tokenizer may ignore case and white space.
    pair = [replace(first, prompt="WHO is it?"), replace(second, prompt="who  is it?")]
    _check_distinct([(e, [5]) for e in pair], "m")
