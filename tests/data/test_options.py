"""What a user may set of a data module, and what is refused."""

import pytest

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.tasks import Example, Task
from tests.conftest import make_trainer
from tests.data.test_data import module, prompts, rows


@pytest.fixture
def file(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", rows(100))
    return tmp_path / "all.jsonl"


@pytest.fixture
def folder(tmp_path):
    for name in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(10, name))
    return tmp_path


SPLITS = {"train_split": "data.train_split", "val_split": "data.val_split", "test_split": "data.test_split"}


@pytest.mark.parametrize("option", SPLITS)
def test_a_single_file_has_no_other_split(option, file):
    with pytest.raises(
        UserError, match=f"data.{option} is 'zz', but .*all.jsonl is one file.*Set it to null, or to one of all, all"
    ):
        module(file, **{option: "zz"}).setup("fit")


def test_a_single_file_may_be_called_by_its_name(tmp_path):
    write_jsonl(tmp_path / "Age.test.jsonl", rows(100))
    for name in ("Age.test", "test", "all"):
        data = module(tmp_path / "Age.test.jsonl", train_split=name, val_split=name)
        data.setup("fit")
        assert [len(some) for some in data.examples.values()] == [50, 10, 40]


@pytest.mark.parametrize("option", SPLITS)
def test_a_folder_has_to_have_the_splits_that_are_named(option, folder):
    with pytest.raises(UserError, match=r"no file for the split 'zz' \(it has test, train, validation\)"):
        module(folder, **{option: "zz"}).setup("fit")


def test_a_test_needs_no_other_splits_than_its_own(file, folder):
    module(file, val_split="zz").setup("test")
    module(folder, train_split="zz", val_split="zz").setup("test")


def test_the_split_that_texts_are_read_from_has_to_exist(file):
    fit_on = {"task": "generic", "task_args": {"answer": "a"}, "path": str(file), "train_split": "zz"}
    with pytest.raises(UserError, match="is one file, whose rows all splits share"):
        module(file, fit_on=fit_on).setup("fit")


def test_a_folder_has_to_have_the_subset_that_is_named(folder):
    with pytest.raises(UserError, match=r"data.subset is 'zz', but the files of .* have the subsets \(none\).*to null"):
        module(folder, subset="zz").setup("fit")
    write_jsonl(folder / "Age.test.jsonl", rows(5))
    with pytest.raises(
        UserError, match="data.subset is 'Aged', but the files of .* have the subsets Age. Set it to one"
    ):
        module(folder, subset=["Age", "Aged"]).setup("fit")
    module(folder, subset="Age").setup("test")


def test_what_is_on_this_machine_has_no_revision(file, folder):
    for path in (file, folder, None):
        with pytest.raises(UserError, match="data.revision is 'v1', but .* is on this machine and has no revisions"):
            TaskDataModule("demo_qa", path and str(path), revision="v1").setup("test")
    fit_on = {"task": "generic", "task_args": {"answer": "a"}, "path": str(file), "revision": "v1"}
    with pytest.raises(UserError, match="data.revision is 'v1'"):
        module(file, fit_on=fit_on).setup("fit")


@pytest.mark.parametrize(
    ("restrict", "fit", "evaluation"), [(False, False, False), (True, True, True), ("evaluation", False, True)]
)
def test_decoding_is_restricted_where_it_is_wanted(restrict, fit, evaluation):
    data = TaskDataModule("demo_qa", restrict=restrict)
    assert (data.restricted("fit"), data.restricted("evaluation")) == (fit, evaluation)


@pytest.mark.parametrize("restrict", [False, True, "evaluation"])
def test_restricted_decoding_says_nothing_but_letters(restrict):
    said = {"fit": set(), "evaluation": set()}

    class Noting(CorrSteer):
        def setup(self, stage):
            super().setup(stage)
            observe = self.fit_answering.observe
            self.fit_answering.observe = lambda *given: heard(observe(*given))
            compare = self.answering.compare
            self.answering.compare = lambda *given: [noted(*found) for found in compare(*given)]

    def heard(texts):
        said["fit"].update(text.strip() for text in texts)
        return texts

    def noted(texts, rewards):
        said["evaluation"].update(text.strip() for text in texts)
        return texts, rewards

    data = TaskDataModule("demo_qa", train_size=96, val_size=64, restrict=restrict)
    make_trainer().fit(Noting("demo", "demo", layers=[1], sign="positive"), datamodule=data)
    letters = {stage: texts <= set("ABCD") for stage, texts in said.items()}
    assert letters == {"fit": restrict is True, "evaluation": restrict is not False}


def test_a_fit_on_texts_may_be_evaluated_restricted(file):
    fit_on = {"task": "text_classification", "path": str(file)}
    assert TaskDataModule("demo_qa", fit_on=fit_on, restrict="evaluation").restricted("evaluation")
    with pytest.raises(UserError, match="restrict needs a task with answer letters"):
        TaskDataModule("demo_qa", fit_on=fit_on, restrict=True)
    with pytest.raises(UserError, match="restrict needs a task with answer letters"):
        module(file, restrict="evaluation")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": 3}, "data.task is 3; it takes str"),
        ({"task": None}, "data.task is None; it takes str"),
        ({"path": 3}, "data.path is 3; it takes str or nothing"),
        ({"task_args": ["a"]}, r"data.task_args is \['a'\]; it takes options by name or nothing"),
        ({"filter": "x"}, "data.filter is 'x'; it takes options by name or nothing"),
        ({"fit_on": [1]}, r"data.fit_on is \[1\]; it takes options by name or nothing"),
        (
            {"fit_on": {"task": "demo_qa", "task_args": [1]}},
            r"data.fit_on.task_args is \[1\]; it takes options by name",
        ),
        (
            {"fit_on": {"task": "demo_qa", "val_split": "x"}},
            "data.fit_on has no option 'val_split'; it takes task, path",
        ),
        ({"subset": [1]}, r"data.subset is \[1\]; it takes str or a list of str or nothing"),
        ({"train_size": "9"}, "data.train_size is '9'; it takes int"),
        ({"batch_size": True}, "data.batch_size is True; it takes int"),
        ({"seed": 0.5}, "data.seed is 0.5; it takes int"),
        ({"restrict": "test"}, "data.restrict is 'test'; it takes true or false or 'evaluation'"),
        ({"restrict": 1}, "data.restrict is 1; it takes true or false or 'evaluation'"),
        ({"revision": 5}, "data.revision is 5; it takes str or nothing"),
    ],
)
def test_values_of_another_kind_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        TaskDataModule(**options)


class Reads(Task):
    max_new_tokens = 1

    def example(self, row, id):
        return Example(id, row["text"], "")


def test_a_task_of_the_users_own_that_fails_names_itself_and_the_row(file):
    with pytest.raises(
        UserError,
        match=rf"the task {__name__}.Reads on the row all:0 failed \(KeyError: 'text', .*test_options.py:\d+\)",
    ):
        TaskDataModule(f"{__name__}.Reads", str(file)).setup("fit")


def test_a_fit_takes_the_validation_rows_only_where_no_split_is_named(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", rows(60, "v"))
    data = module(tmp_path)
    data.setup("validate")
    assert len(prompts(data)["validation"]) == 10


def test_nothing_is_no_name(folder):
    with pytest.raises(UserError, match="data.path is '', which does not exist"):
        TaskDataModule("demo_qa", path="").setup("test")
    with pytest.raises(UserError, match="no file for the split ''"):
        module(folder, test_split="").setup("test")
    with pytest.raises(UserError, match="data.subset is ''"):
        module(folder, subset="").setup("test")
