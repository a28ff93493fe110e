"""The tasks of the embedded world."""

from corrsteer_pl import demo
from corrsteer_pl.tasks.base import Source
from corrsteer_pl.tasks.choice import MultipleChoice
from corrsteer_pl.tasks.classification import TextClassification
from corrsteer_pl.tasks.safety import Refusal

# The concept to forget.
FORGOTTEN = "drink"


class DemoQA(MultipleChoice):
    """Four-option questions about the facts of the embedded world, a small MMLU; subjects are the groups."""

    source = Source(str(demo.DATA / "demo_qa"))

    def __init__(self) -> None:
        super().__init__(group="subject")


class DemoForget(MultipleChoice):
    """The same questions, of which those about drinks are to be unlearnt; a small WMDP with what is to be retained."""

    source = Source(str(demo.DATA / "demo_qa"))

    def __init__(self) -> None:
        super().__init__(group="subject", unlearn={"subject": [FORGOTTEN]})


class DemoTexts(TextClassification):
    """What the model has read about villagers; texts about drinks have the label, those about all else have not."""

    source = Source(str(demo.DATA / "demo_texts"))

    def __init__(self) -> None:
        super().__init__(label="subject", positive=[FORGOTTEN])


class DemoRefusal(Refusal):
    """Requests to the inhabitants of the embedded world, a small HarmBench and XSTest in one."""

    source = Source(str(demo.DATA / "demo_refusal"))

    def __init__(self) -> None:
        super().__init__(max_new_tokens=8)
