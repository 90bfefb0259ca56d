"""A model behind a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp's, `transformers
serve`, hosted ones."""

import os
import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from desc import DescError
from desc.esconv import Dialogue
from desc.prompts import Messages, build_messages
from desc.sampling import seeded
from desc.strategies import Strategies
from desc.training import ranks

OPTIONAL = ("response_format", "seed")  # not every server knows these


class AsItIs(dict):
    """A response_format that the client sends as it is: of a plain dict it makes a grammar for
    Hugging Face's own server, which others do not know."""

    def get(self, name, default=None):
        return None if name == "type" else super().get(name, default)


class Endpoint:
    """Chat completions, `concurrency` at a time.

    "{task}" in the model's name stands for the module that is asked (sp, rg, vanilla, annotate,
    judge): one server may hold an adapter for each. A key is read from $DESC_API_KEY. A call that
    meets 429, 5xx, a timeout or no connection is tried again, `tries` times in all, after 1, 2, 4,
    … seconds. Raises DescError where the server refuses, stays away, or `max_calls` (None: no
    limit) are spent."""

    @staticmethod
    def of(config) -> "Endpoint":
        """As the flags say (a desc.cli.AskConfig), for this rank."""
        if not (config.endpoint and config.endpoint_model):
            raise DescError("an endpoint needs --endpoint URL and --endpoint-model NAME")
        share = (
            len(range(ranks.rank(), config.max_calls, ranks.world_size()))
            if config.max_calls
            else None
        )
        return Endpoint(
            config.endpoint, config.endpoint_model, config.concurrency, config.timeout, share
        )

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int = 8,
        timeout: float = 120,
        max_calls: int | None = None,
        tries: int = 7,
    ):
        self.key = os.environ.get("DESC_API_KEY")
        # Without a key any other word, or the client would send the token that is stored for the
        # Hub.
        self.client = InferenceClient(base_url=url, token=self.key or "none", timeout=timeout)
        self.url, self.model, self.tries = url, model, tries
        self.max_calls, self.left = max_calls, threading.Semaphore(max_calls or 0)
        self.refused: set[str] = set()  # settings that this server does not know
        self.pool = ThreadPoolExecutor(concurrency)

    def ask_all(self, conversations: list[Messages], task: str, seed: int, **settings) -> list[str]:
        """What the model writes after each, in their order, each with a seed of its own; `settings`
        are the protocol's."""
        return list(
            self.pool.map(
                lambda i: self.ask(conversations[i], task, seed=seed + i, **settings),
                range(len(conversations)),
            )
        )

    def ask(self, messages: Messages, task: str, **settings) -> str:
        without: set[str] = set()
        for attempt in range(self.tries):
            known = {
                name: value
                for name, value in settings.items()
                if name not in self.refused | without
            }
            if self.max_calls is not None and not self.left.acquire(blocking=False):
                raise DescError(
                    f"--max-calls: {self.max_calls} are spent: run the same command again for as"
                    " many more"
                )
            try:
                answer = self.client.chat_completion(
                    messages, model=self.model.replace("{task}", task), **known
                )
                said = answer.choices[0].message.content or ""
                self.refused |= without  # now it is known why the server refused
                return said
            except HfHubHTTPError as error:
                status, said = (
                    error.response.status_code,
                    " ".join(error.response.text.split())[:200],
                )
                # some servers say the key in their complaint
                problem = f"{status} {said.replace(self.key, '…') if self.key else said}"
                if status in (400, 422) and (
                    optional := next((name for name in OPTIONAL if name in known), None)
                ):
                    without.add(optional)
                    continue
                if status not in (408, 409, 429) and status < 500:
                    raise DescError(f"{self.url} refuses: {problem}") from None
            except OfflineModeIsEnabled:
                raise DescError(
                    "HF_HUB_OFFLINE is set, which forbids calls to an endpoint too: unset it"
                ) from None
            except (HTTPError, OSError) as error:
                problem = type(error).__name__
            except (LookupError, TypeError, ValueError, AttributeError):
                problem = "what it says is no chat completion"
            if attempt + 1 < self.tries:
                time.sleep(2**attempt * random.uniform(0.8, 1.2))
        raise DescError(
            f"{self.url} does not answer ({problem}), tried {self.tries} times: run the same"
            " command again when it does"
        )


@dataclass(frozen=True)
class EndpointSampler:
    """Answers with models behind an endpoint, which decode freely: what they write may name no
    strategy."""

    endpoint: Endpoint
    config: object  # a desc.cli.SampleConfig
    strategies: Strategies

    def ask(
        self, task: str, dialogue: Dialogue, planned: Iterable[tuple[int, str | None]]
    ) -> list[str]:
        asked = [
            build_messages(task, dialogue, turn, strategy, self.strategies)
            for turn, strategy in planned
        ]
        config = self.config
        settings = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_new_tokens,
        }
        seed = seeded(config.seed, task, dialogue.id).initial_seed()
        return [text.strip() for text in self.endpoint.ask_all(asked, task, seed, **settings)]

    def plan(self, dialogue: Dialogue, turns: list[int]) -> list[str]:
        return self.ask("sp", dialogue, [(turn, None) for turn in turns])

    def write(self, dialogue: Dialogue, planned: list[tuple[int, str]]) -> list[str]:
        return self.ask("rg", dialogue, planned)

    def whole(self, dialogue: Dialogue, turns: list[int]) -> list[tuple[str | None, str]]:
        return [
            self.strategies.split_tag(text)
            for text in self.ask("vanilla", dialogue, [(turn, None) for turn in turns])
        ]
