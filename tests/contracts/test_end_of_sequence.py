"""Generation stops at every token that ends an answer, in all commands alike."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from transformers import GenerationConfig

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.answers.streams import stream
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.special_tokens import turn_end
from tests.architectures import batch_of
from tests.conftest import run_here

PAD, BOS, EOS = 0, 1, 2
NEW = 12
PROMPTS = ("Where does Bela live?\nAnswer:", "Request: sing\nResponse:", "Who feeds the owl?\nAnswer:")
START, END = "<|im_start|>", "<|im_end|>"
USER = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
TEMPLATES = {
    "chatml": f"{{% for m in messages %}}{USER}<|im_end|>\n{{% endfor %}}",
    "last turn only": f"{{% for m in messages %}}{USER}{{{{ '<|im_end|>' if loop.last else '</s>' }}}}{{% endfor %}}",
    "next role": f"{{% for m in messages %}}{USER}{{% endfor %}}",
    "after a space": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} <|im_end|>{% endfor %}",
    "text": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} #END#{% endfor %}",
    "nothing": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
    "broken": "{{ raise_exception('no') }}",
    "drops answers": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endfor %}",
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL, folder)
    return folder


def edit(folder, file, **values):
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def hugging_face(llm, prompts, ends):
    """Texts of `generate` with the given EOS tokens."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([llm.token_ids(prompt)])
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=PAD)
        row = llm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        new = [id for id in row[ids.shape[1] :].tolist() if id not in ends]
        texts.append(llm.tokenizer.decode(new, skip_special_tokens=True))
    return texts


def answers(llm):
    """The texts of each engine."""
    prompts = [llm.token_ids(prompt) for prompt in PROMPTS]
    decoder, batch, unsteered = Decoder(llm, NEW), batch_of(llm, prompts), SteeringVectors.stack([{}], Schedule())
    yield decoder.generate(batch)
    yield decoder.compare(batch, unsteered)[0]
    yield [list(stream(llm, [prompt], unsteered, NEW))[-1][0] for prompt in prompts]
    # As in the endpoint and in lm-eval.
    ids = [torch.tensor([prompt]) for prompt in prompts]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    rows = [llm.model.generate(row, attention_mask=torch.ones_like(row), **options)[0] for row in ids]
    new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    yield llm.tokenizer.batch_decode(new, skip_special_tokens=True)


# What the configuration says, the EOS tokens that count, and what the warning says.
CONFIGURED = {
    "another": ({"eos_token_id": 5}, [5, EOS], r"\(5\).*lack the EOS token of its tokenizer, '</s>' \(2\)"),
    "a list": ({"eos_token_id": [5, EOS]}, [5, EOS], None),
    "a list without it": ({"eos_token_id": [5, 6]}, [5, 6, EOS], r"\(5\).*\(6\).*lack .*'</s>' \(2\)"),
    "none": ({"eos_token_id": None}, [EOS], None),
    "outside": ({"eos_token_id": [99999, EOS]}, [EOS], r"eos_token_id of .* is 99999, .* it is ignored"),
    "the padding": ({"eos_token_id": PAD}, [PAD, EOS], r"'<pad>' \(0\).* lack .*'</s>' \(2\)"),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_all_engines_stop_at_the_tokenizers_end_of_sequence(llm, folder, name):
    values, expected, sentence = CONFIGURED[name]
    edit(folder, "generation_config.json", **values)
    with pytest.warns(UserWarning, match=sentence) if sentence else warnings.catch_warnings():
        model = LanguageModel.load(str(folder))
    assert model.eos_token_ids == expected
    texts = hugging_face(llm, PROMPTS, expected)
    # Without the tokenizer's one, answers go on.
    assert texts != hugging_face(llm, PROMPTS, [5])
    for found in answers(model):
        assert found == texts


def test_the_models_configuration_counts_where_no_generation_is_configured(folder):
    edit(folder, "generation_config.json", eos_token_id=None)
    # Token 5 is a letter: the default of a configuration class in another vocabulary.
    edit(folder, "config.json", eos_token_id=[PAD, 5])
    with pytest.warns(UserWarning, match=r"lack the EOS token of its tokenizer"):
        assert LanguageModel.load(str(folder)).eos_token_ids == [PAD, EOS]


def chatting(llm, template):
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end", "text"),
    [
        ("chatml", END, ""),
        ("last turn only", END, ""),
        ("next role", START, ""),
        ("after a space", END, ""),
        ("text", None, "#END#"),
        ("nothing", None, ""),
        ("broken", None, ""),
        ("drops answers", None, ""),
    ],
)
def test_the_token_after_an_assistant_turn_is_found(llm, template, end, text):
    tokenizer = chatting(llm, template)
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert turn_end(tokenizer) == (expected, text)


def test_a_chat_stops_where_the_template_ends_a_turn(llm, folder):
    """The padding token takes the part of the end of a turn, because the model has an embedding for it."""
    tokenizer = copy.deepcopy(llm.tokenizer)
    end = tokenizer.convert_ids_to_tokens(PAD)
    tokenizer.chat_template = (
        f"{{% for m in messages %}}[{{{{ m['role'] }}}}] {{{{ m['content'] }}}}{end}{{% endfor %}}"
    )
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"lack the token after an answer in its chat template, '<pad>' \(0\)"):
        model = LanguageModel.load(str(folder))
    assert model.eos_token_ids == [EOS, PAD]
    assert model.model.generation_config.eos_token_id == [EOS, PAD]


def test_a_turn_that_ends_in_plain_text_is_reported(llm, folder):
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.chat_template = TEMPLATES["text"]
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"ends an answer with '#END#', which is not a special token"):
        assert LanguageModel.load(str(folder)).eos_token_ids == [EOS]


def test_the_tokens_can_be_chosen(llm, folder):
    edit(folder, "generation_config.json", eos_token_id=5)
    letter = llm.tokenizer.decode([74])
    model = LanguageModel.load(str(folder), eos_tokens=["<pad>", letter])
    assert model.eos_token_ids == [PAD, 74]
    assert Decoder(model, NEW).generate(batch_of(model, [model.token_ids(prompt) for prompt in PROMPTS])) == (
        hugging_face(llm, PROMPTS, [PAD, 74])
    )
    assert model.model.generation_config.eos_token_id == [PAD, 74]
    with pytest.raises(UserError, match=r"model.llm_args.eos_tokens has 'no such token'.* are <pad>, <s>, </s>"):
        LanguageModel.load(str(folder), eos_tokens=["no such token"])


def test_doctor_shows_the_tokens_that_end_an_answer(folder, tmp_path, capsys):
    edit(folder, "generation_config.json", eos_token_id=PAD)
    options = ("--model.saes", "demo", "--data.task", "demo_qa", "--data.train_size", 20, "--data.val_size", 10)
    with pytest.warns(UserWarning, match="lack the EOS token of its tokenizer"):
        run_here("doctor", "--model.llm", folder, *options, cwd=tmp_path)
    assert "'<pad>' (0), '</s>' (2)" in " ".join(capsys.readouterr().out.split())
