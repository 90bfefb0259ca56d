"""A conversation: the planner chooses, the generator says it, the seeker commands."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from desc import cli
from desc.chat.safety import CRISIS, in_danger
from desc.encoding import Item, encode
from desc.esconv import Dialogue, Turn
from desc.lora import adapter_only
from desc.prompts import build_messages
from desc.sampling import grow_branches, score, seeded, stream_text, temper
from desc.storage.files import write_json
from desc.strategies import Strategies

HELP = """\
/strategy NAME   every reply follows this strategy from now on; without NAME the planner chooses
/compare         the last reply before and after DPO, under the same strategy and seed
/undo            takes back your last message and its reply
/save FILE       writes the conversation as JSON in ESConv's schema; nothing else is ever kept
/quit            ends it, as do Ctrl-D and Ctrl-C; during a reply, Ctrl-C stops that alone"""


def attach(model, out: str) -> dict[str, list[str]]:
    """Attach the adapters in `out` as "sp-dpo", "rg-sft", …; the stages of each module, its last
    first. /compare wants both of rg."""
    stages = {"sp": [], "rg": []}
    for module, stage in product(stages, ("dpo", "sft")):
        folder = Path(out) / module / stage
        wanted = module == "rg" or not stages["sp"]
        if wanted and cli.use_adapter(
            model, folder, f"{module}-{stage}", f"train_{stage}.py --task {module} makes one"
        ):
            stages[module].append(stage)
    return {module: found or ["base"] for module, found in stages.items()}


@dataclass
class Chat:
    """A conversation, and the modules that carry it on."""

    model: torch.nn.Module
    tokenizer: object
    config: cli.SampleConfig
    strategies: Strategies
    stages: dict[str, list[str]]
    turns: tuple[Turn, ...] = ()  # as a Dialogue's: alternating, seeker first, supporter last
    forced: str | None = None
    told: bool = False  # that the conversation has grown too long

    def read(
        self,
        task: str,
        dialogue: Dialogue,
        completions: list[str],
        room: int,
        strategy: str | None = None,
    ) -> Item:
        """What a module reads where the dialogue ends, with the seeker. Raises DescError where the
        last message alone is too long."""
        messages = build_messages(task, dialogue, len(dialogue), strategy, self.strategies)
        item = encode(
            self.tokenizer,
            "your message",
            dialogue.id,
            messages,
            completions,
            room,
            end=task == "sp",
        )
        if item.turns_cut and not self.told:
            print(
                "(The conversation has outgrown --max-length: from now on its oldest exchanges are"
                " no longer read.)"
            )
            self.told = True
        return item

    def plan(self, dialogue: Dialogue) -> str:
        """The strategy of the next reply, drawn or forced. Shows the exact distribution, a bar of
        up to 30 blocks a strategy."""
        config, names = self.config, self.strategies
        item = self.read("sp", dialogue, list(names), config.max_length)
        with adapter_only(self.model, f"sp-{self.stages['sp'][0]}"):
            logps = score(self.model, [item], config.max_length)[0]
        odds = temper(logps, config.temperature, config.top_p)
        drawn = torch.multinomial(odds, 1, generator=seeded(config.seed, "plan", len(dialogue)))
        strategy = self.forced or names[int(drawn)]
        for name, p in zip(names, logps.exp().tolist()):
            mark = "" if name != strategy else "  ← forced" if self.forced else "  ← drawn"
            print(f"  {name:<{max(map(len, names))}} {'█' * round(30 * p):<30} {p:6.1%}{mark}")
        return strategy

    def say(self, dialogue: Dialogue, strategy: str, stage: str, speaker: str) -> str:
        """The generator's reply, printed as it grows; an interrupt ends it."""
        config = self.config
        prompt = (
            self.read("rg", dialogue, [""], config.max_length - config.max_new_tokens, strategy)
            .sequences[0]
            .prompt
        )
        seed = seeded(config.seed, "write", len(dialogue)).initial_seed()
        said = ""
        print(f"{speaker} [{strategy}]: ", end="", flush=True)
        try:
            with adapter_only(self.model, f"rg-{stage}"):
                for piece in stream_text(
                    self.tokenizer,
                    (token for _, token in grow_branches(self.model, [prompt], config, seed)),
                ):
                    said += piece
                    print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" … (stopped)")
        return said

    def answer(self, text: str) -> None:
        """Plan and say the reply to a message. Both join the conversation together, or neither
        does."""
        dialogue = Dialogue("chat", (*self.turns, Turn("seeker", text)))
        strategy = self.plan(dialogue)
        if said := self.say(dialogue, strategy, self.stages["rg"][0], "supporter"):
            self.turns = (*dialogue.turns, Turn("supporter", said, strategy))
        else:
            print("(There is no reply: your message is taken back.)")

    def compare(self) -> None:
        for stage, when in (("sft", "before DPO"), ("dpo", "after DPO")):
            if stage in self.stages["rg"]:
                self.say(Dialogue("chat", self.turns[:-1]), self.turns[-1].strategy, stage, when)
            else:
                print(f"{when}: there is no adapter in {Path(self.config.out) / 'rg' / stage}")

    def save(self, name: str) -> None:
        said = [
            {
                "speaker": t.speaker,
                "annotation": {"strategy": t.strategy} if t.strategy else {},
                "content": t.text,
            }
            for t in self.turns
        ]
        try:
            write_json(Path(name).expanduser(), [{"dialog": said}])
            print(f"(Saved in {name}.)")
        # no file's name, or nobody's home, too
        except (OSError, ValueError, RuntimeError) as error:
            print(f"/save {name}: cannot be written ({error})")

    def take(self, line: str) -> None:
        """Do what a line says, be it a message or a command."""
        if in_danger(line):
            print(CRISIS)
        command, rest = (line.split(maxsplit=1) + ["", ""])[:2]
        if not command.startswith("/"):
            line and self.answer(line)
        elif command == "/strategy" and rest and not self.strategies.parse(rest):
            print(
                f"{rest!r} is no strategy{self.strategies.suggestion(rest)}; there are"
                f" {', '.join(self.strategies)}"
            )
        elif command == "/strategy":
            self.forced = self.strategies.parse(rest)
            print(
                f"(Every reply follows {self.forced} from now on.)"
                if rest
                else "(The planner chooses again.)"
            )
        elif command not in ("/compare", "/undo", "/save"):
            print(HELP if command == "/help" else f"{command} is no command; /help lists them")
        elif not self.turns:
            print("(There is no reply yet.)")
        elif command == "/compare":
            self.compare()
        elif command == "/save":
            self.save(rest)
        else:
            print(f"(Taken back: {self.turns[-2].text[:60]!r} and its reply.)")
            self.turns = self.turns[:-2]
