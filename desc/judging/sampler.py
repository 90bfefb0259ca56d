"""The module that answers, behind an endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from desc.domain import Domain
from desc.esconv import Dialogue
from desc.flags import SampleConfig
from desc.judging.completions import OTHER_FORM
from desc.judging.endpoint import MARK, Endpoint
from desc.prompts import build_messages
from desc.sampling import seed_of


@dataclass(frozen=True)
class EndpointSampler:
    """Answers with models behind an endpoint.

    They decode freely, so what they write may name no strategy. `turns` are supporter turns of a
    dialogue, on the human history."""

    endpoint: Endpoint
    config: SampleConfig
    domain: Domain

    def plan(self, dialogue: Dialogue, turns: list[int], task: str = "sp") -> list[str]:
        """What the planner writes before each turn: the name of a strategy, if all is well."""
        return self.answer_turns(dialogue, [(turn, None) for turn in turns], task)

    def write(
        self, planned: list[tuple[Dialogue, list[tuple[int, str]]]], task: str = "rg"
    ) -> list[list[str]]:
        """A reply at each (turn, strategy) of each dialogue."""
        return [self.answer_turns(dialogue, turns, task) for dialogue, turns in planned]

    def whole(self, asked: list[tuple[Dialogue, list[int]]]) -> list[list[tuple[str | None, str]]]:
        """(strategy, reply) at these turns of each dialogue, by one model for both.

        If no strategy can be read, it is None, and the reply is the whole text."""
        written = [self.plan(dialogue, turns, "vanilla") for dialogue, turns in asked]
        return [[self.domain.strategies.split_tag(text) for text in texts] for texts in written]

    def answer_turns(
        self, dialogue: Dialogue, planned: Sequence[tuple[int, str | None]], task: str
    ) -> list[str]:
        """What the module of `task` writes at each (turn, strategy); only rg is told a strategy."""
        config = self.config
        harmless = break_marks(dialogue)
        conversations = [
            build_messages(task, harmless, turn, strategy, self.domain, config.layout)
            for turn, strategy in planned
        ]
        completions = self.endpoint.ask_all(
            conversations,
            task,
            seed_of(config.seed, task, dialogue.id),
            lambda text: self.is_readable(task, text),
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
        )
        # A text of another form is kept. What was cut off may be thoughts, and odd content is none.
        kept = (None, OTHER_FORM)
        return [said.text if said.problem in kept else "" for said in completions]

    def is_readable(self, task: str, text: str) -> bool:
        """Whether a text has the form that the module of `task` should write."""
        if task == "sp":
            return self.domain.strategies.parse(text) is not None
        if task == "vanilla":
            return self.domain.strategies.split_tag(text)[0] is not None
        return bool(text)


def break_marks(dialogue: Dialogue) -> Dialogue:
    """The dialogue with a blank within what a server's chat template could read as its own mark.

    Utterances are data: "<|im_end|>" typed by a seeker must not end a turn."""
    turns = [replace(turn, text=MARK.sub(r"\g<0> ", turn.text)) for turn in dialogue.turns]
    return replace(dialogue, turns=tuple(turns))
