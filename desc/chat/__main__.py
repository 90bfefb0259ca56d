"""A conversation in the terminal: you are the seeker, the planner chooses a strategy, and the
generator replies.

    python -m desc.chat                   OUT/sp and OUT/rg, each with its last stage
    python -m desc.chat < messages.txt    without a terminal: one message or command per line

The last stage is dpo, else sft, else the base model. Bars show the planner's exact probabilities.
The strategy is drawn from them (--temperature, --top-p), or forced by /strategy. Draws depend on
--seed, the turn's number and the conversation alone: after /undo, the same message has the same
reply."""

import sys
from contextlib import suppress
from pathlib import Path

from desc import DescError, cli
from desc.calibration import read_calibration
from desc.chat.conversation import Chat, attach
from desc.chat.safety import OPENING
from desc.flags import SampleConfig, parse
from desc.training import ranks


def main():
    config = parse(SampleConfig)
    sys.stdin.reconfigure(errors="replace")
    # a warning must not wait in a pipe for the reply
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    print(OPENING)
    domain = config.read_domain()
    device = ranks.join_ranks()
    cli.resolve_auto(config, device)
    model, tokenizer = cli.load_model(config, device)
    stages = attach(model, config)
    planner_folder = Path(config.out) / "sp" / stages["sp"][0]
    calibration = read_calibration(planner_folder, config, domain.strategies)
    chat = Chat(model, tokenizer, config, domain, stages, calibration)
    print(
        f"planner: {chat.stages['sp'][0]}, generator: {chat.stages['rg'][0]} (base is untrained)."
        " /help lists the commands."
    )
    prompt = f"\n{domain.speakers[0]}: " if sys.stdin.isatty() else ""
    with suppress(EOFError, KeyboardInterrupt):  # at the prompt both mean goodbye
        while True:
            line = input(prompt).strip()
            if line == "/quit":
                break
            try:
                chat.take(line)
            except KeyboardInterrupt:
                print("\n(Stopped: all is as it was before.)")
            except DescError as error:
                print(f"{error} (it is left out)")
    print("\nGoodbye, and take care.")


if __name__ == "__main__":
    with suppress(ImportError):
        import readline  # noqa: F401  by which input() can edit a line and recall earlier ones
    cli.run(main)
