"""No special token follows a prompt unless the chat template wrote it."""

import copy
import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing, ByteLevel, RobertaProcessing, Sequence, TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer

from corrsteer_pl import TaskDataModule, demo
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_training.texts import answered_rows, token_rows
from tests.architectures import batch_of
from tests.conftest import make_trainer, run_here

PAD, BOS, EOS = 0, 1, 2
SPECIAL = [("<pad>", PAD), ("<s>", BOS), ("</s>", EOS)]
TEXTS = ["Where does the owl live?", " Answer:", "", "x", "It ends with </s>", "<pad> two\n\nlines"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(single):
    return TemplateProcessing(single=single, pair="$A $B", special_tokens=SPECIAL)


# The post-processor, and the special tokens before and after a text.
PROCESSORS = {
    "bos": (template("<s> $A"), [BOS], []),
    "eos": (template("$A </s>"), [], [EOS]),
    "bos and eos": (template("<s> $A </s>"), [BOS], [EOS]),
    "several": (template("<s> $A </s> <pad> </s>"), [BOS], [EOS, PAD, EOS]),
    "another prefix": (template("<pad> <s> $A </s>"), [PAD, BOS], [EOS]),
    "bert": (BertProcessing(("</s>", EOS), ("<s>", BOS)), [BOS], [EOS]),
    "roberta": (RobertaProcessing(("</s>", EOS), ("<s>", BOS)), [BOS], [EOS]),
    "sequence": (Sequence([ByteLevel(), template("$A </s>")]), [], [EOS]),
    "bos as end": (template("$A <s>"), [], [BOS]),
}


def with_processor(tokenizer, processor):
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processor
    return changed


def without_processor(tokenizer):
    """An encoder of the tokenizers library alone, which adds nothing."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    plain = Tokenizer.from_str(json.dumps(state))
    return lambda text: plain.encode(text).ids


def appending(llm, processor="bos and eos"):
    return LanguageModel("appending", llm.model, with_processor(llm.tokenizer, PROCESSORS[processor][0]))


@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_are_those_of_the_text_after_the_prefix(llm, name):
    processor, prefix, suffix = PROCESSORS[name]
    given, reference = with_processor(llm.tokenizer, processor), without_processor(llm.tokenizer)
    assert given("x")["input_ids"] == prefix + reference("x") + suffix
    model = appending(llm, name)
    assert model.appended == suffix
    for text in TEXTS:
        assert model.token_ids(text) == prefix + reference(text)
    assert model.token_rows(TEXTS) == [prefix + reference(text) for text in TEXTS]
    assert token_rows(model, TEXTS, 3) == [(prefix + reference(text))[:3] for text in TEXTS]
    assert model.adds_bos == (prefix[:1] == [BOS])
    # The given tokenizer is not changed.
    assert given("x")["input_ids"] == prefix + reference("x") + suffix


def test_a_tokenizer_that_appends_nothing_is_taken_as_it_is(llm):
    assert LanguageModel("same", llm.model, llm.tokenizer).tokenizer is llm.tokenizer


@pytest.mark.parametrize("text", ["<s>Where?", "Where?"])
def test_bos_stands_once(llm, text):
    twice = with_processor(llm.tokenizer, template("<s> <s> $A"))
    expected = [BOS, *without_processor(llm.tokenizer)("Where?")]
    assert LanguageModel("twice", llm.model, twice).token_ids(text) == expected
    assert llm.token_ids(text) == expected


def test_a_tokenizer_written_in_python_appends_nothing(llm):
    # ByT5: the bytes of the text, each plus the three special tokens, and EOS.
    given = ByT5Tokenizer()
    expected = [byte + 3 for byte in b"Who?"]
    assert given("Who?")["input_ids"] == [*expected, given.eos_token_id]
    model = LanguageModel("byt5", llm.model, given)
    assert model.token_ids("Who?") == expected
    assert model.token_rows(["Who?", "A"]) == [expected, [ord("A") + 3]]
    assert model.tokenizer("Who?", return_tensors="pt")["input_ids"].tolist() == [expected]


@pytest.fixture
def folder(llm, tmp_path):
    """A model folder whose tokenizer appends EOS, truncates and pads."""
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL, folder)
    with_processor(llm.tokenizer, PROCESSORS["bos and eos"][0]).save_pretrained(folder)
    path = folder / "tokenizer.json"
    padding = {
        "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": PAD, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": padding, "truncation": truncation}))
    return folder


def test_padding_and_truncation_of_a_tokenizer_file_do_not_matter(llm, folder):
    model = LanguageModel.load(str(folder))
    assert model.appended == [EOS]
    for text in TEXTS:
        assert model.token_ids(text) == [BOS, *without_processor(llm.tokenizer)(text)]
    assert model.token_rows(TEXTS) == [model.token_ids(text) for text in TEXTS]


def test_a_saved_tokenizer_does_not_append_again(llm, folder, tmp_path):
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_eos_token": True, "add_bos_token": True}))
    LanguageModel.load(str(folder)).tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved("Who?")["input_ids"] == [BOS, *without_processor(llm.tokenizer)("Who?")]


def test_answers_are_those_of_hugging_face_without_a_post_processor(llm):
    """Few-shot prompts, too: EOS between the prompt and its answer changes most of them."""
    model, data = appending(llm), TaskDataModule(task="demo_qa", train_size=20, val_size=10, shots=1)
    data.prepare_data()
    data.setup("fit")
    reference = without_processor(llm.tokenizer)
    turns = [data.turns(example) for example in data.examples["train"][:20]]
    prompts = [f"{shot} {solution}\n\n{prompt}" for shot, solution, prompt in turns]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    expected, broken = [], 0
    for prompt in prompts:
        ids = torch.tensor([[BOS, *reference(prompt)]])
        answer = llm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        expected.append(llm.tokenizer.decode(answer, skip_special_tokens=True))
        ended = torch.cat([ids, torch.tensor([[EOS]])], 1)
        other = llm.model.generate(ended, attention_mask=torch.ones_like(ended), **options)[0, ended.shape[1] :]
        broken += llm.tokenizer.decode(other, skip_special_tokens=True) != expected[-1]
    assert broken > len(prompts) / 2
    found = Decoder(model, 8).generate(batch_of(model, [model.prompt_ids(some, chat=False) for some in turns]))
    assert found == expected


def test_a_chat_ends_as_its_template_wrote_it(llm):
    tokenizer = with_processor(llm.tokenizer, PROCESSORS["bos and eos"][0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model, reference = LanguageModel("chat", llm.model, tokenizer), without_processor(tokenizer)
    text = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert model.prompt_ids(["Who?"], chat=True) == [BOS, *reference(text)]
    # As an answer in the chat of `train_saes`.
    assert answered_rows(model, ["Who?"], ["Me"], 99) == [[BOS, *reference(text), *reference("Me")]]
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ eos_token }}"
    model = LanguageModel("chat", llm.model, tokenizer)
    assert model.prompt_ids(["Who?"], chat=True) == [BOS, *reference("Who?"), EOS]


def test_lm_eval_encodes_without_an_end(llm):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    model = appending(llm)
    harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer)
    expected = [BOS, *without_processor(llm.tokenizer)("Who feeds the owl?")]
    assert harness.tok_encode("Who feeds the owl?") == expected
    assert harness.tok_batch_encode(["Who feeds the owl?"])[0].tolist() == [expected]


def test_doctor_reports_the_removed_tokens(folder, tmp_path, capsys):
    options = ("--model.saes", "demo", "--data.task", "demo_qa", "--data.train_size", 20, "--data.val_size", 10)
    run_here("doctor", "--model.llm", folder, *options, cwd=tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "appended by the tokenizer" in shown
    assert "'</s>' (2): removed" in shown


def test_accuracy_is_that_of_the_shipped_model(folder, tmp_path):
    from corrsteer_pl import CorrSteer

    found = []
    for name in ("demo", str(folder)):
        module = CorrSteer(name, "demo", layers=[1])
        data = TaskDataModule(task="demo_qa", train_size=40, val_size=20, test_size=100)
        trainer = make_trainer(default_root_dir=tmp_path)
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        found.append([(o.answer_baseline, o.answer_steered) for o in module.outcomes])
    assert found[0] == found[1]
