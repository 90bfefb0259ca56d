"""A conversation: the planner chooses, the generator says it, the seeker commands.

Who is answered is called the seeker here, whatever the domain's word for them is."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from desc import cli
from desc.calibration import Calibration
from desc.chat.safety import CRISIS, in_danger
from desc.domain import Domain
from desc.encoding import Item, encode
from desc.esconv import Dialogue, Turn
from desc.flags import SampleConfig
from desc.lora import adapter_only, ready_adapters
from desc.prompts import build_messages
from desc.sampling import grow_branches, score, seed_of, seeded, stream_text, temper
from desc.storage.files import write_json

HELP = """\
/strategy NAME   every reply follows this strategy from now on; without NAME the planner chooses
/compare         the last reply before and after DPO, under the same strategy and seed
/undo            takes back your last message and its reply
/save FILE       writes the conversation as JSON in ESConv's schema; nothing else is ever kept
/quit            ends it, as do Ctrl-D and Ctrl-C; during a reply, Ctrl-C stops that alone"""


def attach(model, config: SampleConfig) -> dict[str, list[str]]:
    """Attach the adapters in OUT as "sp-dpo", "rg-sft", …. Returns the stages of each module, its
    last first. Of rg both are attached, because /compare needs both."""
    stages = {"sp": [], "rg": []}
    for module, stage in product(stages, ("dpo", "sft")):
        if module == "sp" and stages["sp"]:
            continue
        folder, otherwise = (
            Path(config.out) / module / stage,
            f"train_{stage}.py --task {module} makes one",
        )
        if cli.use_adapter(config, model, folder, module, otherwise, f"{module}-{stage}"):
            stages[module].append(stage)
    return {module: attached or ["base"] for module, attached in stages.items()}


@dataclass
class Chat:
    """A conversation, and the modules that carry it on."""

    model: torch.nn.Module
    tokenizer: object
    config: SampleConfig
    domain: Domain
    stages: dict[str, list[str]]
    calibration: Calibration | None = None  # of the planner
    turns: tuple[Turn, ...] = ()  # as a Dialogue's: alternating, seeker first, supporter last
    forced: str | None = None  # the strategy that every reply follows
    warned_of_length: bool = False

    def read(
        self,
        task: str,
        dialogue: Dialogue,
        completions: list[str],
        room: int,
        strategy: str | None = None,
    ) -> Item:
        """What a module reads at the end of the dialogue, which is the seeker's message. Raises
        DescError if that message alone is too long."""
        messages = build_messages(
            task, dialogue, len(dialogue), strategy, self.domain, self.config.layout
        )
        item = encode(
            self.tokenizer,
            "your message",
            dialogue.id,
            messages,
            completions,
            room,
            self.domain.speakers,
            end=task == "sp",
        )
        if item.turns_cut and not self.warned_of_length:
            print(
                "(The conversation has outgrown --max-length: from now on its oldest exchanges are"
                " no longer read.)"
            )
            self.warned_of_length = True
        return item

    def plan(self, dialogue: Dialogue) -> str:
        """The strategy of the next reply, drawn or forced. Prints the exact distribution, one bar
        of up to 30 blocks per strategy."""
        config, names = self.config, self.domain.strategies
        item = self.read("sp", dialogue, list(names), config.max_length)
        with adapter_only(self.model, f"sp-{self.stages['sp'][0]}"):
            logps = score(self.model, [item], config.max_length)[0]
        if self.calibration:
            logps = self.calibration.apply(logps)
        odds = temper(logps, config.temperature, config.top_p)
        drawn = torch.multinomial(odds, 1, generator=seeded(config.seed, "plan", len(dialogue)))
        strategy = self.forced or names[int(drawn)]
        mark = "  ← forced" if self.forced else "  ← drawn"
        width = max(map(len, names))
        for name, p in zip(names, logps.exp().tolist()):
            bar = "█" * round(30 * p)
            print(f"  {name:<{width}} {bar:<30} {p:6.1%}{mark if name == strategy else ''}")
        return strategy

    def say(self, dialogue: Dialogue, strategy: str, stage: str, speaker: str) -> str:
        """The generator's reply, printed as it grows. An interrupt ends it."""
        config = self.config
        room = config.max_length - config.max_new_tokens
        prompt = self.read("rg", dialogue, [""], room, strategy).sequences[0].prompt
        seed = seed_of(config.seed, "write", len(dialogue))
        reply = ""
        print(f"{speaker} [{strategy}]: ", end="", flush=True)
        try:
            with adapter_only(self.model, f"rg-{stage}"), ready_adapters(self.model):
                branches = grow_branches(self.model, [[prompt]], config, [seed])
                for piece in stream_text(self.tokenizer, (token for _, token in branches)):
                    reply += piece
                    print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" … (stopped)")
        return reply

    def answer(self, text: str) -> None:
        """Plan and say the reply to a message. Both join the conversation, or neither does."""
        dialogue = Dialogue("chat", (*self.turns, Turn("seeker", text)))
        strategy = self.plan(dialogue)
        reply = self.say(dialogue, strategy, self.stages["rg"][0], self.domain.speakers[1])
        if reply:
            self.turns = (*dialogue.turns, Turn("supporter", reply, strategy))
        else:
            print("(There is no reply: your message is taken back.)")

    def compare(self) -> None:
        """Say the last reply again, before and after DPO."""
        dialogue, last = Dialogue("chat", self.turns[:-1]), self.turns[-1]
        for stage, when in (("sft", "before DPO"), ("dpo", "after DPO")):
            if stage in self.stages["rg"]:
                self.say(dialogue, last.strategy, stage, when)
            else:
                print(f"{when}: there is no adapter in {Path(self.config.out) / 'rg' / stage}")

    def save(self, name: str) -> None:
        """Write the conversation in ESConv's schema."""
        utterances = []
        for turn in self.turns:
            annotation = {"strategy": turn.strategy} if turn.strategy else {}
            utterances.append(
                {"speaker": turn.speaker, "annotation": annotation, "content": turn.text}
            )
        try:
            write_json(Path(name).expanduser(), [{"dialog": utterances}])
            print(f"(Saved in {name}.)")
        # no file's name, or nobody's home, too
        except (OSError, ValueError, RuntimeError) as error:
            print(f"/save {name}: cannot be written ({error})")

    def choose_strategy(self, name: str) -> None:
        """Force a strategy, or let the planner choose again."""
        strategies = self.domain.strategies
        strategy = strategies.parse(name)
        if name and not strategy:
            hint = strategies.suggestion(name)
            print(f"{name!r} is no strategy{hint}; there are {', '.join(strategies)}")
            return
        self.forced = strategy
        if strategy:
            print(f"(Every reply follows {strategy} from now on.)")
        else:
            print("(The planner chooses again.)")

    def take(self, line: str) -> None:
        """Do what a line says: answer a message, or follow a command."""
        if in_danger(line):
            print(CRISIS)
        command, rest = (line.split(maxsplit=1) + ["", ""])[:2]
        if not command.startswith("/"):
            if line:
                self.answer(line)
        elif command == "/strategy":
            self.choose_strategy(rest)
        elif command == "/help":
            print(HELP)
        elif command not in ("/compare", "/undo", "/save"):
            print(f"{command} is no command; /help lists them")
        elif not self.turns:
            print("(There is no reply yet.)")
        elif command == "/compare":
            self.compare()
        elif command == "/save":
            self.save(rest)
        else:
            print(f"(Taken back: {self.turns[-2].text[:60]!r} and its reply.)")
            self.turns = self.turns[:-2]
