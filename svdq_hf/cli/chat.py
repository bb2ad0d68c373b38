"""`svdq chat`: a conversation with a causal model in the terminal, or one answer, with its tokens a second.

The words come from transformers' own `generate` and streamer, the form of a turn from the model's chat
template; a model without one continues the text. Not here: how fast a model is in general.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from svdq_hf.cli.options import add_choices, config_of

PROMPT = "> "
LEAVE, FORGET = ("/quit", "/exit"), "/new"
"""What may be typed instead of a question."""


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's parser, added to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat", help="talk to a causal model, quantized or not, and see its tokens a second"
    )
    parser.add_argument("folder", help="a model's folder, or the Hub's user/model")
    parser.add_argument("--prompt", help="one question; without it, a conversation until /quit or Ctrl-D")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (256)")
    parser.add_argument(
        "--greedy", action="store_true", help="the likeliest token each time, whatever the model's settings"
    )
    parser.add_argument("--quantize", action="store_true", help="quantize a dense model while it is loaded")
    add_choices(parser, "demo")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Load the model, then answer.

    Raises:
        ValueError: --json without --prompt; or the folder holds no causal model with a tokenizer.
    """
    if options.json and options.prompt is None:
        raise ValueError("--json prints one answer: give --prompt as well")
    chat = _loaded(options)
    if options.prompt is None:
        _converse(chat)
        return {}
    answer = chat.answer(options.prompt, show=not options.json)
    if not options.json:
        _show_speed(answer)
    return asdict(answer)


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its tokens, and seconds from the question to the first and to the last."""

    text: str
    tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: without the first token, which waits for the whole question to be read."""
        return (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)


@dataclass
class Chat:
    """A conversation: a model, its tokenizer, how it generates, and what was said so far."""

    model: Any
    tokenizer: Any
    generation: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str, *, show: bool = True) -> Answer:
        """The model's answer to `question`, after all that was said before.

        Args:
            question: of the user.
            show: whether the words are printed as they come.
        """
        from transformers import TextStreamer

        self.turns.append({"role": "user", "content": question})
        inputs = self._inputs()
        started = time.perf_counter()
        clock = _clock()
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        tokens = self.model.generate(
            **inputs, **self.generation, streamer=streamer, stopping_criteria=[clock]
        )[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        self.turns.append({"role": "assistant", "content": text})
        return Answer(text, len(tokens), clock.times[0] - started, clock.times[-1] - started)

    def _inputs(self) -> Any:
        """What the model reads: the conversation by its chat template, or the last text as it is."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(self.turns[-1]["content"], return_tensors="pt").to(self.model.device)
        return self.tokenizer.apply_chat_template(
            self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)


def _clock() -> Any:
    """A stopping criterion that stops nothing and notes when each token was there."""
    import torch
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return Clock()


def _loaded(options: argparse.Namespace) -> Chat:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from svdq_hf.hub.client import local_folder

    folder = local_folder(options.folder)
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{options.folder} is a {kind} model, which does not write text: no causal model")
    choices = {"quantization_config": config_of(options)} if options.quantize else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{options.folder} has no tokenizer that can be loaded: save the model's own there, "
            f"tokenizer.save_pretrained({options.folder!r})"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(folder, **choices).eval()
    greedy = {"do_sample": False} if options.greedy else {}
    return Chat(model, tokenizer, {"max_new_tokens": options.max_new_tokens, **greedy})


def _converse(chat: Chat) -> None:
    """Questions from the terminal until the user leaves."""
    print(f"{LEAVE[0]} or Ctrl-D leaves, {FORGET} starts anew", file=sys.stderr)
    while True:
        try:
            question = input(PROMPT).strip()
        except EOFError:
            return
        if question in LEAVE:
            return
        if question == FORGET:
            chat.turns.clear()
        elif question:
            _show_speed(chat.answer(question))


def _show_speed(answer: Answer) -> None:
    print(
        f"[{answer.tokens} tokens, {answer.tokens_per_second:.1f} a second, the first after "
        f"{answer.first_seconds:.2f} s]",
        file=sys.stderr,
    )
