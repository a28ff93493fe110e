"""IFEval: instructions whose observance a program can verify, such as a number of words."""

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.tasks.base import PAPER_SHARES, Example, Source, Task, check_new_tokens, column, present, structured
from corrsteer_pl.tasks.template import Template

NEEDED = ("lm_eval", "langdetect", "nltk", "punkt", "immutabledict")


class IFEval(Task):
    """The reward is the share of a prompt's instructions that the response follows to the letter (strict).

    The checkers are those of lm-eval. Kinds of instructions, such as ``length_constraints``, are the groups; a prompt
    with several kinds is in several groups. The checkers count sentences with NLTK's Punkt, whose parameters come with
    the extra, so that no verdict depends on a download.

    Args:
        all_or_nothing: Reward 1 if all instructions are followed, else 0.
        max_new_tokens: Longest response.
        template: The prompt, with the field ``{request}``, and any column of the row.

    Source:
        Zhou et al. 2023, arXiv 2311.07911; Hub id ``google/IFEval``.
    """

    source = Source("google/IFEval", train="train", validation="train", test="train", shares=PAPER_SHARES)
    instructs = True

    def __init__(self, all_or_nothing: bool = False, max_new_tokens: int = 256, template: str = "{request}") -> None:
        if missing := [package for package in NEEDED if find_spec(package) is None]:
            raise UserError(
                f"the task ifeval needs the package {missing[0]}, of the 'ifeval' extra: "
                "pip install 'corrsteer_pl[ifeval]'."
            )
        self.all_or_nothing = all_or_nothing
        self.template = Template(template, "data.task_args.template", ("request",))
        self.max_new_tokens = check_new_tokens(max_new_tokens)
        self._checkers: Mapping[str, Any] = {}

    @property
    def reward_name(self) -> str:
        """What the results say of the reward."""
        return "all instructions followed" if self.all_or_nothing else "share of instructions followed"

    def load(self, device: str) -> None:
        """Load the checkers, which import much."""
        self._checkers = self._checkers or checkers()

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one row, with its instructions."""
        request = str(column(row, "prompt", "prompt", id))
        names = structured(column(row, "instruction_id_list", "instruction_id_list", id))
        options = structured(column(row, "kwargs", "kwargs", id))
        if not isinstance(names, Sequence) or not isinstance(options, Sequence) or not len(names) == len(options) > 0:
            raise UserError(f"row {id} needs as many kwargs as instructions in its instruction_id_list, at least one.")
        # The Hub's table has a column for every option, empty where an instruction has none of that name.
        given = [{key: value for key, value in (some or {}).items() if value is not None} for some in options]
        kinds = sorted({str(name).partition(":")[0] for name in names})
        details = {"names": json.dumps(list(names)), "options": json.dumps(given), "request": request}
        prompt = self.template.fill(row, id, {"request": request})
        return Example(id, prompt, ", ".join(map(str, names)), present(*kinds), details=details)

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Share of the instructions that each response follows, or whether it follows all."""
        verdicts = self._verdicts(texts, examples)
        return [float(all(some)) if self.all_or_nothing else sum(some) / len(some) for some in verdicts]

    def measures(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float | None]:
        """The benchmark's two strict accuracies, over prompts and over instructions."""
        verdicts = self._verdicts(texts, examples)
        flat = [verdict for some in verdicts for verdict in some]
        if not flat:
            return {"prompt_level_strict": None, "instruction_level_strict": None}
        prompts = sum(map(all, verdicts)) / len(verdicts)
        return {"prompt_level_strict": prompts, "instruction_level_strict": sum(flat) / len(flat)}

    def _verdicts(self, texts: Sequence[str], examples: Sequence[Example]) -> list[list[bool]]:
        """Whether each response follows each instruction of its prompt."""
        self.load("cpu")
        return [self._followed(text, example) for text, example in zip(texts, examples, strict=True)]

    def _followed(self, text: str, example: Example) -> list[bool]:
        details = example.details
        found = []
        for name, options in zip(json.loads(details["names"]), json.loads(details["options"]), strict=True):
            if name not in self._checkers:
                known = choices(nearest(name, self._checkers))
                raise UserError(f"row {example.id} has the instruction {name!r}, which is none of {known}, ...")
            checker = self._checkers[name](name)
            checker.build_description(**options)
            if "letter" in options:
                # lm-eval replaces a sign that is no letter, such as the # of some rows, by a letter at random.
                checker._letter = options["letter"].lower()
            if "prompt" in (checker.get_instruction_args() or {}):
                checker.build_description(prompt=details["request"])
            found.append(bool(text.strip() and checker.check_following(text)))
        return found


def checkers() -> Mapping[str, Any]:
    """lm-eval's checkers by the names of instructions, the same verdicts every time and without a network."""
    import nltk

    # lm-eval fetches Punkt's parameters when it is imported; a package brings the same ones.
    with patch.object(nltk, "download"), redirect_stdout(StringIO()):
        from langdetect import DetectorFactory
        from lm_eval.tasks.ifeval import instructions_registry, instructions_util
    DetectorFactory.seed = 0
    punkt = _english_punkt()

    def words(text: str) -> list[str]:
        return [word for some in punkt.tokenize(text) for word in nltk.word_tokenize(some, preserve_line=True)]

    instructions_util._get_sentence_tokenizer = lambda: punkt
    instructions_util.nltk = SimpleNamespace(tokenize=nltk.tokenize, word_tokenize=words)
    return instructions_registry.INSTRUCTION_DICT


def _english_punkt() -> Any:
    """NLTK's splitter of sentences, with its parameters for English."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    from punkt import load_model

    learnt, parameters = load_model("english"), PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        getattr(parameters, name).update(getattr(learnt, name))
    parameters.ortho_context.update(learnt.ortho_context)
    return PunktSentenceTokenizer(parameters)
