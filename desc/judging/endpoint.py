"""A model behind a server that speaks OpenAI's protocol.

Such servers are vLLM, SGLang, llama.cpp's, `transformers serve` and hosted ones."""

import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from desc import DescError
from desc.esconv import Dialogue
from desc.flags import AskConfig, SampleConfig
from desc.prompts import Messages, build_messages
from desc.sampling import seed_of
from desc.strategies import Strategies
from desc.training import ranks

OPTIONAL = ("response_format", "seed")  # settings that not every server knows
NOT_UNDERSTOOD = (400, 422)  # what a server answers to a setting that it does not know
TEMPORARY = (408, 409, 429)  # as is any status from 500
# What the client raises if the server cannot be reached or refuses, then what reading raises if the
# answer is no chat completion.
CALL_ERRORS = (HTTPError, OSError, LookupError, TypeError, ValueError, AttributeError)


class VerbatimFormat(dict):
    """A response_format that the client sends as it is.

    If a plain dict's "type" is json_schema, the client turns it into a grammar for Hugging Face's
    own server, which other servers do not know. It asks get() for the type, so get() hides it."""

    def get(self, name, default=None):
        return None if name == "type" else super().get(name, default)


def json_schema_format(schema: dict) -> dict:
    """The protocol's response_format, for servers that can hold a model to a JSON schema."""
    named = {"name": "answer", "schema": schema, "strict": True}
    return VerbatimFormat(type="json_schema", json_schema=named)


class Endpoint:
    """Chat completions, `concurrency` at a time.

    "{task}" in the model's name stands for the module that is asked (sp, rg, vanilla, annotate or
    judge), because one server may hold an adapter for each. A key is read from $DESC_API_KEY.

    A call that meets 408, 409, 429, 5xx, a timeout or no connection, or whose answer is no chat
    completion, is tried again, `tries` times in all, after 1, 2, 4, … seconds. `max_calls` counts
    every try; None sets no limit."""

    @staticmethod
    def of(config: AskConfig) -> "Endpoint":
        """The endpoint that the flags name, with this rank's share of --max-calls.

        Raises DescError if a flag is missing."""
        if not (config.endpoint and config.endpoint_model):
            raise DescError("an endpoint needs --endpoint URL and --endpoint-model NAME")
        max_calls = None
        if config.max_calls:
            max_calls = len(range(ranks.rank(), config.max_calls, ranks.world_size()))
        return Endpoint(
            config.endpoint, config.endpoint_model, config.concurrency, config.timeout, max_calls
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
        self.url = url
        self.model = model
        self.tries = tries
        self.key = os.environ.get("DESC_API_KEY")
        # Without a key it is given another word. Otherwise the client would send the token that is
        # stored for the Hub.
        self.client = InferenceClient(base_url=url, token=self.key or "none", timeout=timeout)
        self.max_calls = max_calls
        self.calls_left = threading.Semaphore(max_calls or 0)
        self.refused: set[str] = set()  # settings that this server does not know
        self.pool = ThreadPoolExecutor(concurrency)

    def ask_all(self, conversations: list[Messages], task: str, seed: int, **settings) -> list[str]:
        """What the model writes after each conversation, in their order.

        The i-th is sampled with the seed `seed` + i. `settings` are the protocol's. Raises
        DescError as `ask` does."""

        def ask_one(i: int) -> str:
            return self.ask(conversations[i], task, seed=seed + i, **settings)

        return list(self.pool.map(ask_one, range(len(conversations))))

    def ask(self, messages: Messages, task: str, **settings) -> str:
        """What the model writes after `messages`; `settings` are the protocol's.

        A server may refuse a setting of OPTIONAL. Then the call is repeated without it. Raises
        DescError if the server refuses, does not answer, or if `max_calls` are spent."""
        left_out: set[str] = set()
        for attempt in range(self.tries):
            unsent = self.refused | left_out
            sent = {name: value for name, value in settings.items() if name not in unsent}
            self.spend_call()
            try:
                text = self.complete(messages, task, sent)
            except OfflineModeIsEnabled:
                raise DescError(
                    "HF_HUB_OFFLINE is set, which forbids calls to an endpoint too: unset it"
                ) from None
            except CALL_ERRORS as error:
                problem = self.describe(error)
                suspect = suspect_setting(error, sent)
                if suspect:
                    left_out.add(suspect)
                    continue
                if is_refusal(error):
                    raise DescError(f"{self.url} refuses: {problem}") from None
            else:
                self.refused |= left_out  # the call succeeds without them, so they were the cause
                return text
            if attempt + 1 < self.tries:
                wait(attempt)
        raise DescError(
            f"{self.url} does not answer ({problem}), tried {self.tries} times: run the same"
            " command again when it does"
        )

    def spend_call(self) -> None:
        """Count one call. Raises DescError if `max_calls` are spent."""
        if self.max_calls is not None and not self.calls_left.acquire(blocking=False):
            raise DescError(
                f"--max-calls: {self.max_calls} are spent: run the same command again for as many"
                " more"
            )

    def complete(self, messages: Messages, task: str, settings: dict) -> str:
        """One attempt. Raises one of CALL_ERRORS if it brings no text."""
        model = self.model.replace("{task}", task)
        answer = self.client.chat_completion(messages, model=model, **settings)
        return answer.choices[0].message.content or ""

    def describe(self, error: Exception) -> str:
        """What went wrong in a call, without the key, which some servers repeat."""
        if isinstance(error, HfHubHTTPError):
            complaint = error.response.text
            if self.key:  # before the text is shortened, which could leave a part of the key
                complaint = complaint.replace(self.key, "…")
            return f"{error.response.status_code} {' '.join(complaint.split())[:200]}"
        if isinstance(error, (HTTPError, OSError)):
            return type(error).__name__
        return "what it says is no chat completion"


def suspect_setting(error: Exception, sent: dict) -> str | None:
    """The first optional setting in `sent` if the server did not understand the call, else None."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in NOT_UNDERSTOOD:
        return next((name for name in OPTIONAL if name in sent), None)
    return None


def is_refusal(error: Exception) -> bool:
    """Whether the server answered with a status for which trying again is useless."""
    if not isinstance(error, HfHubHTTPError):
        return False
    status = error.response.status_code
    return status < 500 and status not in TEMPORARY


def wait(attempt: int) -> None:
    """Wait about 1, 2, 4, … seconds after attempt 0, 1, 2, …

    The times vary a little, so that calls which failed together do not return together."""
    time.sleep(2**attempt * random.uniform(0.8, 1.2))


@dataclass(frozen=True)
class EndpointSampler:
    """Answers with models behind an endpoint.

    They decode freely, so what they write may name no strategy. `turns` are supporter turns of a
    dialogue, on the human history."""

    endpoint: Endpoint
    config: SampleConfig
    strategies: Strategies

    def plan(self, dialogue: Dialogue, turns: list[int], task: str = "sp") -> list[str]:
        """What the planner writes before each turn: the name of a strategy, if all is well."""
        return self.answer_turns(dialogue, [(turn, None) for turn in turns], task)

    def write(
        self, dialogue: Dialogue, planned: list[tuple[int, str]], task: str = "rg"
    ) -> list[str]:
        """A reply at each (turn, strategy)."""
        return self.answer_turns(dialogue, planned, task)

    def whole(self, dialogue: Dialogue, turns: list[int]) -> list[tuple[str | None, str]]:
        """(strategy, reply) at each turn, by one model for both.

        If no strategy can be read, it is None, and the reply is the whole text."""
        texts = self.answer_turns(dialogue, [(turn, None) for turn in turns], "vanilla")
        return [self.strategies.split_tag(text) for text in texts]

    def answer_turns(
        self, dialogue: Dialogue, planned: Sequence[tuple[int, str | None]], task: str
    ) -> list[str]:
        """What the module of `task` writes at each (turn, strategy); only rg is told a strategy."""
        config = self.config
        conversations = [
            build_messages(task, dialogue, turn, strategy, self.strategies)
            for turn, strategy in planned
        ]
        texts = self.endpoint.ask_all(
            conversations,
            task,
            seed_of(config.seed, task, dialogue.id),
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
        )
        return [text.strip() for text in texts]
