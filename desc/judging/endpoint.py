"""A model behind a server that speaks OpenAI's protocol.

Such servers are vLLM, SGLang, llama.cpp's, `transformers serve` and hosted ones."""

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from desc import DescError
from desc.flags import AskConfig
from desc.judging.completions import (
    CUT_OFF,
    EMPTY,
    ODD,
    OTHER_FORM,
    Completion,
    format_unread,
    read_completion,
)
from desc.judging.transport import BadStatus, find_address, post, read_key
from desc.prompts import Messages
from desc.storage.journal import Journal, work_key
from desc.training import ranks

# Settings that not every server knows, in the order in which they are left out.
OPTIONAL = ("response_format", "seed", "chat_template_kwargs")
NOT_UNDERSTOOD = (400, 422)  # what a server answers to a setting that it does not know
TEMPORARY = (408, 409, 429)  # as is any status from 500
LONGEST_WAIT = 600  # seconds; a server that asks to wait longer ends the run
MORE_ROOM = 4  # times as many tokens for the second try of an answer that was cut off

# The first character of chat templates' own marks, such as "<|im_end|>", "</s>" and "[INST]".
MARK = re.compile(r"<(?=[|｜/_A-Za-z])|\[(?=\||/?g?[A-Z_]+\])|◁")


class Refused(DescError):
    """The server refuses a call, and would refuse it again."""


# What a call raises if the server cannot be reached or refuses, then what reading raises if the
# answer is no chat completion.
CALL_ERRORS = (BadStatus, HTTPError, OSError, LookupError, TypeError, ValueError, AttributeError)


def json_schema_format(schema: dict) -> dict:
    """The protocol's response_format, for servers that can hold a model to a JSON schema."""
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def read_template_options(text: str | None) -> dict:
    """The options of --template-options; none without that flag.

    Raises DescError if the text is no JSON object."""
    try:
        options = json.loads(text or "{}")
        json.dumps(options, allow_nan=False)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise DescError(
            """--template-options should be a JSON object, such as '{"enable_thinking": false}'"""
        )
    return options


class Endpoint:
    """Chat completions, `concurrency` at a time.

    "{task}" in the model's name stands for the module that is asked (sp, rg, vanilla, annotate or
    judge), because one server may hold an adapter for each. A key is read from $DESC_API_KEY.

    A call that meets 408, 409, 429, 5xx, a timeout or no connection, or whose answer is no chat
    completion, is tried again, `tries` times in all, after 1, 2, 4, … seconds, or after as many as
    the server's Retry-After says. `max_calls` counts every try; None sets no limit. `timeout`
    (seconds) bounds a whole call. Redirects are not followed, because they could lead a seeker's
    words to another host. `template_options` go to the server's chat template, as vLLM, SGLang and
    llama.cpp read them ("chat_template_kwargs").

    A model's thoughts are removed, whether the server leaves them in the content or not. Raises
    DescError if the URL or the key is no such thing."""

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
            config.endpoint,
            config.endpoint_model,
            config.concurrency,
            config.timeout,
            max_calls,
            template_options=read_template_options(config.template_options),
        )

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int = 8,
        timeout: float = 120,
        max_calls: int | None = None,
        tries: int = 7,
        template_options: dict | None = None,
    ):
        self.address, self.url = find_address(url)
        self.model = model
        self.timeout = timeout
        self.tries = tries
        self.template_options = template_options or {}
        self.key = read_key()
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.max_calls = max_calls
        self.calls_left = threading.Semaphore(max_calls or 0)
        self.refused: set[str] = set()  # settings that this server does not know
        self.thinking: set[str] = set()  # tasks of which an answer held thoughts
        self.counts: Counter = Counter()  # answers by (task, problem)
        self.lock = threading.Lock()
        self.kept: Journal | None = None  # answers, so that none is paid for twice
        self.pool = ThreadPoolExecutor(concurrency)

    def ask_all(
        self,
        conversations: list[Messages],
        task: str,
        seed: int,
        readable: Callable[[str], bool] = bool,
        **settings,
    ) -> list[Completion]:
        """What the model writes after each conversation, in their order.

        The i-th is sampled with the seed `seed` + i. Everything else is as in `ask`."""

        def ask_one(i: int) -> Completion:
            return self.ask(conversations[i], task, readable, seed=seed + i, **settings)

        futures = [self.pool.submit(ask_one, i) for i in range(len(conversations))]
        try:
            return [future.result() for future in futures]
        except DescError:
            for future in futures:
                future.cancel()
            wait_for_all(futures)  # what is under way is paid for, so it is kept
            raise

    def ask(
        self, messages: Messages, task: str, readable: Callable[[str], bool] = bool, **settings
    ) -> Completion:
        """What the model writes after `messages`, and why it cannot be read if `readable` says so
        of its text. `settings` are the protocol's.

        An answer that was cut off and cannot be read is asked for once more, with MORE_ROOM times
        the `max_tokens`. Raises DescError if the server refuses, does not answer, or if `max_calls`
        are spent."""
        if self.template_options:
            settings["chat_template_kwargs"] = self.template_options
        key = work_key(self.address, self.model, task, json.dumps([messages, settings]))
        if self.kept and key in self.kept.done:
            return self.count(task, Completion(**self.kept.done[key]["answer"]))
        completion = self.call(messages, task, settings, OPTIONAL)
        problem = self.find_problem(completion, task, readable)
        if problem == CUT_OFF and "max_tokens" in settings:
            settings["max_tokens"] *= MORE_ROOM
            try:
                completion = self.call(messages, task, settings, ())
            except Refused:
                pass  # because the model's context has no more room
            else:
                problem = self.find_problem(completion, task, readable)
        completion = replace(completion, problem=problem)
        if self.kept:
            with self.lock:
                self.kept.append({"key": key, "answer": asdict(completion)})
        return self.count(task, completion)

    def count(self, task: str, completion: Completion) -> Completion:
        """The completion, once it is counted."""
        with self.lock:
            self.counts[task, completion.problem] += 1
        return completion

    def keep_answers(self, folder: Path) -> None:
        """Keep each answer in FOLDER/calls.RANK.jsonl as it comes, and use those that are there
        instead of calls, until the file is discarded. Every rank must call this."""
        self.kept = Journal(
            folder, "calls", {}, ranks.rank(), ranks.world_size(), ranks.wait_for_all
        )

    def find_problem(
        self, completion: Completion, task: str, readable: Callable[[str], bool]
    ) -> str | None:
        """Why an answer cannot be read; None if it can.

        Some servers leave thoughts that were cut off in the content, without a mark. So if the
        model has shown thoughts before, an answer that was cut off and shows none is not read."""
        if completion.has_thoughts:
            self.thinking.add(task)
        if completion.is_odd:
            return ODD
        shows_none = task in self.thinking and not completion.has_thoughts
        perhaps_thoughts = completion.is_cut_off and shows_none
        if readable(completion.text) and not perhaps_thoughts:
            return None
        if completion.is_cut_off:
            return CUT_OFF
        return OTHER_FORM if completion.text else EMPTY

    def print_unread(self) -> None:
        """Print which share of this run's answers, on all ranks, could not be read, and why.

        Every rank must call it."""
        counts: Counter = Counter()
        refused: set[str] = set()
        for counts_of_rank, refused_of_rank in ranks.gather_objects((self.counts, self.refused)):
            counts += counts_of_rank
            refused |= refused_of_rank
        tasks = sorted({task for task, _ in counts})
        if not tasks:
            return
        line = f"answers of {self.url} that could not be read: "
        line += ", ".join(format_unread(task, counts) for task in tasks)
        if refused:
            line += f"; it does not know {', '.join(sorted(refused))}"
        print(line)

    def call(
        self, messages: Messages, task: str, settings: dict, suspects: Sequence[str]
    ) -> Completion:
        """What the model writes after `messages`, in at most `tries` calls.

        A server may refuse a setting, of which `suspects` may be left out. Then the call is
        repeated without it. Raises Refused if the server refuses, and DescError if it does not
        answer or if `max_calls` are spent."""
        body = {"model": self.model.replace("{task}", task), "messages": messages}
        left_out: set[str] = set()
        for attempt in range(self.tries):
            unsent = self.refused | left_out
            sent = {name: value for name, value in settings.items() if name not in unsent}
            self.spend_call()
            try:
                completion = read_completion(
                    post(self.address, self.headers, body | sent, self.timeout)
                )
            except OfflineModeIsEnabled:
                raise DescError(
                    "HF_HUB_OFFLINE is set, which forbids calls to an endpoint too: unset it"
                ) from None
            except CALL_ERRORS as error:
                problem = self.describe(error)
                suspect = suspect_setting(error, [name for name in suspects if name in sent])
                if suspect:
                    left_out.add(suspect)
                    continue
                if is_refusal(error):
                    raise Refused(f"{self.url} refuses: {problem}") from None
                seconds = error.seconds if isinstance(error, BadStatus) else 0.0
            else:
                self.refused |= left_out  # the call succeeds without them, so they were the cause
                return completion
            if seconds > LONGEST_WAIT:
                raise DescError(
                    f"{self.url} asks to wait {seconds:.0f} seconds ({problem}): run the same"
                    " command again then"
                )
            if attempt + 1 < self.tries:
                wait(attempt, seconds)
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

    def describe(self, error: Exception) -> str:
        """What went wrong in a call, in one line, without the key, which some servers repeat."""
        if isinstance(error, BadStatus):
            complaint = error.complaint
            if self.key:  # before the text is shortened, which could leave a part of the key
                complaint = complaint.replace(self.key, "…")
            complaint = "".join(sign if sign.isprintable() else " " for sign in complaint)
            return f"{error.status} {' '.join(complaint.split())[:200]}"
        if isinstance(error, TimeoutError):
            return f"nothing within --timeout {self.timeout:g}"
        if isinstance(error, (HTTPError, OSError)):
            return type(error).__name__
        return "what it says is no chat completion"


def suspect_setting(error: Exception, names: Sequence[str]) -> str | None:
    """The setting, of `names`, that the server may not have understood; None if it did.

    It is the first that the server's complaint names or, if it names none, the first."""
    if not isinstance(error, BadStatus) or error.status not in NOT_UNDERSTOOD:
        return None
    named = [name for name in names if name in error.complaint]
    return next(iter([*named, *names]), None)


def is_refusal(error: Exception) -> bool:
    """Whether the server answered with a status for which trying again is useless."""
    return isinstance(error, BadStatus) and error.status < 500 and error.status not in TEMPORARY


def wait(attempt: int, at_least: float = 0.0) -> None:
    """Wait about 1, 2, 4, … seconds after attempt 0, 1, 2, …, but no less than `at_least`.

    The times vary a little, so that calls which failed together do not return together."""
    time.sleep(max(2**attempt * random.uniform(0.8, 1.2), at_least))
